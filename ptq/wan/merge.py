"""A LoRA merged into an expert's tensors as they are read: W + strength * scale * B A, in the stored dtype of W.

The same reader serves all stages: recording and the reference run copy its tensors into a loaded pipeline, quantization
reads its blocks from it, so all of them see the same bits. Names and alphas are translated by diffusers, for the files that
`load_lora_weights` takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ptq import ui
from ptq.checkpoint.safetensors_file import TensorEntry, read_header
from ptq.checkpoint.shards import ShardSet
from ptq.errors import PtqError, shown
from ptq.store.files import write_tensors
from ptq.store.lora import LoraInfo
from ptq.wan.layout import ModelLayout
from ptq.wan.pipeline import experts_of

PREFIX = "transformer."
"""What diffusers' names begin with, whichever expert the file is for."""
_PICKLES = (b"PK", b"\x80")
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
_CONVERSION_ERRORS = (ValueError, KeyError, IndexError, RuntimeError, TypeError, AttributeError, NameError)


@dataclass(frozen=True)
class LowRank:
    """Of one layer: down [r, K], up [N, r], bias [N] or None, and the factor of all three (alpha / r)."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scale: float

    def delta(self, kind: str) -> Tensor | None:
        """What is added to the layer's `weight` or `bias` at strength 1, float32."""
        if kind == "weight":
            return self.scale * (self.up.float() @ self.down.float())
        return None if self.bias is None or kind != "bias" else self.scale * self.bias.float()


class MergedShards(ShardSet):
    """An expert's tensors with a LoRA in them; the LoRA is kept in memory, the expert is not.

    Args:
        directory: of the expert.
        lora: with the path of its file.

    Raises:
        PtqError: no LoRA, or not of this model.
    """

    def __init__(self, directory: str | Path, lora: LoraInfo) -> None:
        super().__init__(directory)
        assert lora.path is not None
        self._lora, self._layers = lora, read_lora(Path(lora.path))
        for name, layer in self._layers.items():
            self._check(name, layer)

    @property
    def merged(self) -> list[str]:
        """Names of the tensors that the LoRA changes."""
        names = [(f"{layer}.weight", f"{layer}.bias", low.bias) for layer, low in self._layers.items()]
        return [name for weight, bias, own in names for name in ((weight,) if own is None else (weight, bias))]

    def read(self, name: str) -> Tensor:
        """One tensor, merged, in its stored dtype, on the CPU."""
        tensor = super().read(name)
        layer, _, kind = name.rpartition(".")
        delta = self._layers[layer].delta(kind) if layer in self._layers else None
        return tensor if delta is None else (tensor.float() + self._lora.strength * delta).to(tensor.dtype)

    def write_merged(self, path: Path, names: Iterable[str]) -> dict[str, TensorEntry]:
        """Write those of these tensors that the LoRA changes to a file of their own; returns their entries in it."""
        changed = set(self.merged).intersection(names)
        if not changed:
            return {}
        write_tensors(path, {name: self.read(name) for name in sorted(changed)})
        return read_header(path)

    def _check(self, name: str, low: LowRank) -> None:
        where, entry = f"{self._lora.path} does not fit {self.directory}", self.entries.get(f"{name}.weight")
        advice = "Give the LoRA that was trained for this model: its size, and text or image to video."
        if entry is None:
            raise PtqError(f"{where}: it changes {name}, which this model does not have. {advice}")
        wanted = list(entry.shape)
        found = [low.up.shape[0], low.down.shape[-1]]
        if len(wanted) != 2 or low.down.ndim != 2 or low.up.ndim != 2 or found != wanted:
            raise PtqError(
                f"{where}: its factors of {name} are {list(low.up.shape)} and {list(low.down.shape)}, the layer is {wanted}. {advice}"
            )
        bias = self.entries.get(f"{name}.bias")
        if low.bias is not None and (bias is None or bias.shape != tuple(low.bias.shape)):
            raise PtqError(
                f"{where}: it changes the bias of {name} by {list(low.bias.shape)} values, the layer has {list(bias.shape) if bias else 'no bias'}. {advice}"
            )
        rank = low.down.shape[0]
        if rank == 0 or low.up.shape[1] != rank:
            raise PtqError(
                f"{self._lora.path}: the factors of {name} are {list(low.up.shape)} and {list(low.down.shape)}; expected one common rank of at least 1. The file is damaged or was not finished; download it again."
            )


@torch.no_grad()
def merge_into(pipe: Any, layout: ModelLayout, loras: Mapping[str, LoraInfo]) -> Any:
    """Put LoRAs into the experts of a pipeline that was loaded from this directory; returns it.

    Args:
        loras: expert -> LoRA, with paths.
    """
    for expert, info in loras.items():
        module, shards = experts_of(pipe)[expert], MergedShards(layout.path / expert, info)
        for name in shards.merged:
            module.get_parameter(name).copy_(shards.read(name))
    return pipe


def read_lora(path: Path) -> dict[str, LowRank]:
    """Layer -> its factors, under diffusers' names of the layers.

    Raises:
        PtqError: no safetensors file, no LoRA of a Wan transformer, one of another kind, NaN in it.
    """
    with open(path, "rb") as handle:
        if handle.read(2).startswith(_PICKLES):
            raise PtqError(
                f"{path} is a pickle, which runs code when it is opened and is never read here. Give the LoRA as safetensors."
            )
    header = read_header(path)
    found = f"found {', '.join(list(header)[:2]) or 'no tensor'}"
    if any(word in name for name in header for word in _MAGNITUDES):
        raise PtqError(f"{path} is a DoRA, whose magnitudes cannot be merged as a LoRA. Give a plain LoRA.")
    _warn_of_norms(path, header)
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    try:
        state, metadata = WanLoraLoaderMixin.lora_state_dict(
            str(path), return_lora_metadata=True, use_safetensors=True, local_files_only=True
        )
    except _CONVERSION_ERRORS as error:
        raise PtqError(
            f"{path} is not a LoRA that diffusers can read for Wan ({type(error).__name__}: {ui.shorten(str(error), 200)}); {found}. Give the file in the names of diffusers or of the original repository."
        ) from error
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        layer, separator, part = name.removeprefix(PREFIX).partition(".lora_")
        if not name.startswith(PREFIX) or not separator:
            raise PtqError(
                f"{path} has no LoRA of a Wan transformer: expected names like {PREFIX}blocks.0.attn1.to_q.lora_A.weight or diffusion_model.blocks.0.self_attn.q.lora_down.weight, {found}."
            )
        if not torch.isfinite(tensor).all():
            raise PtqError(f"{path}: tensor {name} holds NaN or infinite values. Download the file again.")
        layers.setdefault(layer, {})[part] = tensor
    if not layers:
        raise PtqError(f"{path} has no LoRA tensors; {found}.")
    settings = {name.removeprefix(PREFIX): value for name, value in (metadata or {}).items()}
    return {layer: _low_rank(path, layer, parts, settings) for layer, parts in layers.items()}


def _low_rank(path: Path, layer: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LowRank:
    """One layer; `settings` are those of PEFT that a file may carry (alpha of all layers, of some, root of the rank)."""
    unknown = sorted(set(parts) - {"A.weight", "B.weight", "B.bias"})
    if unknown or not {"A.weight", "B.weight"} <= set(parts):
        raise PtqError(
            f"{path}: layer {layer} has {', '.join(f'lora_{part}' for part in sorted(parts))}; expected lora_A.weight and lora_B.weight, and at most lora_B.bias. The file is damaged, or no plain LoRA."
        )
    down = parts["A.weight"]
    rank = down.shape[0] if down.ndim else 0
    alpha = _alpha(path, layer, settings, rank)
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank) if rank else 1.0
    return LowRank(down, parts["B.weight"], parts.get("B.bias"), scale)


def _alpha(path: Path, layer: str, settings: Mapping[str, Any], rank: int) -> float:
    """Of one layer: its own, that of all, or the rank. PEFT's patterns are expressions; files name layers, or their ends."""
    alpha, patterns = settings.get("lora_alpha", rank), settings.get("alpha_pattern") or {}
    for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
        name = pattern.strip("^$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise PtqError(
                f"{path}: its alpha_pattern {shown(pattern)} is an expression; expected the name of a layer."
            )
        if f".{layer}".endswith(f".{name}"):
            alpha = own
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise PtqError(
            f"{path}: alpha of {layer} is {shown(alpha)}; expected a finite number. Download the file again."
        )
    return float(alpha)


def _warn_of_norms(path: Path, header: Mapping[str, TensorEntry]) -> None:
    """diffusers leaves differences of norms out, which are zero in the files that it knows."""
    names = [name for name in header if "norm" in name and name.endswith((".diff", ".diff_b"))]
    with safe_open(path, framework="pt") as handle:
        lost = [name for name in names if handle.get_tensor(name).any()]
    if lost:
        ui.warn(f"{path} also changes {len(lost)} norms ({lost[0]}, ...), which stay as they are, as in diffusers.")
