"""Running one expert block by block from its files: head, single blocks, tail; never the whole model in memory.

The head (patch embedding, condition embedder) and the tail (output norm and projection) are not written again here: the
real `WanTransformer3DModel.forward` runs with its block list replaced by a single module that either captures what the
first block would receive, or injects what the last block returned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from ptq.checkpoint.layers import replace_linears
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.shards import ShardSet
from ptq.errors import PtqError
from ptq.store.calibration import DenoiserCall
from ptq.wan.block import block_prefix

CACHED_CONTEXT_BYTES = 512 * 2**20
"""Contexts kept over all records of an expert; the others are computed again (a head costs far less than a block)."""


@dataclass(frozen=True)
class BlockContext:
    """What every block of a call receives besides its hidden states.

    context: tokens [R, L, D] of the text, behind those of the image where the model reads them; temb: modulation [R, 6, D] or [R, tokens, 6, D]; rotary: pair of [1, tokens, 1, d], the same for the R calls.
    """

    context: Tensor
    temb: Tensor
    rotary: Any

    @property
    def nbytes(self) -> int:
        return self.context.nbytes + self.temb.nbytes + sum(table.nbytes for table in self.rotary)


class ExpertReplay:
    """One expert, original or packed.

    Args:
        shards: its tensors.
        config: its config.json.
        device, dtype: where and in which dtype blocks run (float32 on the CPU; norms and modulation stay float32).

    Raises:
        PtqError: a tensor is missing or has another shape than the configuration says.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: dict[str, Any],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shards, self.config, self.device, self.dtype = shards, config, torch.device(device), dtype
        packed = config.get("quantization_config")
        self.packed = None if packed is None else PackedConfig.parse(packed, str(shards.directory / "config.json"))
        self._model = _skeleton(config, self.packed)
        self._check_shapes()
        self._skeletons = list(self._model.blocks)
        self.num_blocks = len(self._skeletons)
        self._model.blocks = nn.ModuleList()
        rest = {name: shards.read(name) for name in self._model.state_dict()}
        self._load(self._model, rest)
        self._contexts: dict[str, BlockContext] = {}

    def _check_shapes(self) -> None:
        for name, tensor in self._model.state_dict().items():
            entry = self.shards.entries.get(name)
            if entry is None:
                raise PtqError(
                    f"{self.shards.directory} has no tensor {name}, which its config.json requires. The checkpoint is incomplete, or the configuration belongs to another model."
                )
            if entry.shape != tuple(tensor.shape):
                raise PtqError(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}, its config.json asks for {list(tensor.shape)}. The configuration and the weights are not of one model."
                )

    def _load(self, module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
        """Materialise `module` from meta with `tensors`, in the replay's dtype except where Wan keeps float32."""
        keep = WanTransformer3DModel._keep_in_fp32_modules
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                fp32 = self.dtype == torch.float32 or any(part in keep for part in name.split("."))
                tensor = tensor.to(torch.float32 if fp32 else self.dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor.to(self.device), requires_grad=False))
        return module.to(self.device).eval()

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its weights, as an independent module: the caller drops it when done.

        Tensors that the model has no place for are left out (releases of Wan 2.1 carry unused `norm_added_q`).

        Raises:
            PtqError: a weight holds NaN or infinity; names file and tensor.
        """
        prefix = block_prefix(index)
        tensors = self.shards.read_prefix(prefix)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                entry = self.shards.entries[prefix + name]
                raise PtqError(
                    f"{entry.file}: tensor {entry.name} holds NaN or infinite values. A damaged weight cannot be quantized; download or copy the checkpoint again."
                )
        block = copy.deepcopy(self._skeletons[index])
        known = block.state_dict()
        return self._load(block, {name: tensor for name, tensor in tensors.items() if name in known})

    @torch.no_grad()
    def head(self, name: str, *calls: DenoiserCall) -> tuple[Tensor, BlockContext]:
        """Inputs of block 0 for R recorded calls of one size.

        They are computed call by call: products of one row have other last bits than those of several, which blocks do not.

        Args:
            name: of the calls; their context is kept under it while there is room.

        Returns:
            hidden [R, tokens, D] and the context shared by all blocks.

        Raises:
            PtqError: a call lacks the image tokens that this model reads.
        """
        captured = []
        for call in calls:
            capture = _Capture()
            self._forward(capture, call)
            captured.append(capture.inputs)
        hidden, text, temb, (rotary, *_) = zip(*captured, strict=True)
        context = self._contexts.get(name)
        if context is None:
            context = BlockContext(_joined(text), _joined(temb), rotary)
            if sum(kept.nbytes for kept in self._contexts.values()) + context.nbytes <= CACHED_CONTEXT_BYTES:
                self._contexts[name] = context
        return _joined(hidden), context

    def context(self, name: str, calls: Callable[[], Sequence[DenoiserCall]]) -> BlockContext:
        """The context of recorded calls, from the cache or computed from the calls (read only then)."""
        cached = self._contexts.get(name)
        return cached if cached is not None else self.head(name, *calls())[1]

    @torch.no_grad()
    def tail(self, hidden: Tensor, call: DenoiserCall) -> Tensor:
        """The denoiser's output [R, C, T, H, W] given the last block's output [R, tokens, D]."""
        return self._forward(_Inject(hidden.to(self.device)), call)

    def _forward(self, block: nn.Module, call: DenoiserCall) -> Tensor:
        image = call.encoder_hidden_states_image
        if image is None and self._model.config.image_dim is not None:
            raise PtqError(
                f"{self.shards.directory} reads image tokens in every block, but the calls were recorded without them (by an earlier version, or from another model). Record them again: `ptq calibrate` with --fresh or another --out."
            )
        self._model.blocks = nn.ModuleList([block])
        output = self._model(
            hidden_states=call.hidden_states.to(self.device, self.dtype),
            timestep=call.timestep.to(self.device),
            encoder_hidden_states=call.encoder_hidden_states.to(self.device, self.dtype),
            encoder_hidden_states_image=None if image is None else image.to(self.device, self.dtype),
            return_dict=False,
        )[0]
        self._model.blocks = nn.ModuleList()
        return output


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, context: BlockContext) -> Tensor:
    """One block on hidden states [R, tokens, D] -> [R, tokens, D]."""
    return block(hidden, context.context, context.temb, context.rotary)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def state_names(config: dict[str, Any], packed: PackedConfig | None) -> list[str]:
    """Tensor names of an expert in state-dict order, original (None) or packed."""
    return list(expected_shapes(config, packed))


def expected_shapes(config: dict[str, Any], packed: PackedConfig | None) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of an expert in state-dict order, original (None) or packed."""
    return {name: tuple(tensor.shape) for name, tensor in expected_tensors(config, packed).items()}


def expected_tensors(config: dict[str, Any], packed: PackedConfig | None) -> dict[str, Tensor]:
    """Tensor name -> tensor on meta of an expert in state-dict order, original (None) or packed."""
    return _skeleton(config, packed).state_dict()


def _skeleton(config: dict[str, Any], packed: PackedConfig | None) -> nn.Module:
    """The expert without weights: parameters on meta, buffers (rotary tables) real."""
    with init_empty_weights():
        model: nn.Module = WanTransformer3DModel.from_config(
            {key: value for key, value in config.items() if key != "quantization_config"}
        )
    if packed is not None:
        replace_linears(model, packed)
    return model


class _Capture(nn.Module):
    """Stands in for the blocks and keeps what the first one would receive."""

    def forward(self, hidden: Tensor, context: Tensor, temb: Tensor, rotary: Any) -> Tensor:
        self.inputs = (hidden, context, temb, rotary)
        return hidden


class _Inject(nn.Module):
    """Stands in for the blocks and returns what the last one returned."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        return self._hidden
