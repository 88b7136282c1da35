"""Names inside a WanTransformer3DModel: the ten Linears of a block, their seven distinct inputs, the experts.

Anything else in the package receives these names as data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.config import ModelPreset, load_preset
from ptq.config.load import validate
from ptq.config.preset import PRESET_FILE
from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import read_json

BLOCKS = "blocks"
INPUTS: dict[str, tuple[str, ...]] = {
    "attn1.in": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.out": ("attn1.to_out.0",),
    "attn2.q": ("attn2.to_q",),
    "attn2.context": ("attn2.to_k", "attn2.to_v"),
    "attn2.out": ("attn2.to_out.0",),
    "ffn.in": ("ffn.net.0.proj",),
    "ffn.hidden": ("ffn.net.2",),
}
"""Distinct input of a block -> the Linears that read it. "attn2.context" is the same tensor for every block."""

LINEARS: tuple[str, ...] = tuple(linear for linears in INPUTS.values() for linear in linears)
EXPERTS = ("transformer", "transformer_2")
"""High-noise and low-noise expert; TI2V-5B has only the first."""


CONFIG_KEYS = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "out_channels")
"""What this package reads from a transformer's config.json."""


def block_prefix(index: int) -> str:
    """Prefix of a block's tensors in the expert's state dict."""
    return f"{BLOCKS}.{index}."


@dataclass(frozen=True)
class ModelLayout:
    """What a Wan pipeline directory holds, read from its JSON files only.

    Attributes:
        path: the pipeline directory.
        experts: expert name -> its transformer's config.json.
        pipeline_class: class name in model_index.json.
        preset: generation defaults.
        boundary_ratio: timesteps at or above boundary_ratio * 1000 go to `transformer`; None with one expert.
    """

    path: Path
    experts: dict[str, dict[str, Any]]
    pipeline_class: str
    preset: ModelPreset
    boundary_ratio: float | None

    def num_blocks(self, expert: str) -> int:
        """Number of transformer blocks of an expert."""
        return int(self.experts[expert]["num_layers"])

    @property
    def is_packed(self) -> bool:
        """Whether the experts are already a packed checkpoint of this package."""
        return any(config.get("quantization_config") for config in self.experts.values())

    def linear_shapes(self, expert: str) -> dict[str, tuple[int, int]]:
        """(N, K) of each Linear of a block of this expert."""
        config = self.experts[expert]
        d = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        ffn = int(config["ffn_dim"])
        special = {"ffn.net.0.proj": (ffn, d), "ffn.net.2": (d, ffn)}
        return {name: special.get(name, (d, d)) for name in LINEARS}


def read_layout(path: str | Path) -> ModelLayout:
    """Read and check a Wan pipeline directory.

    Raises:
        PtqError: not a diffusers pipeline, not a Wan pipeline, or a part is missing; says what was expected.
    """
    path = Path(path)
    index_path = path / "model_index.json"
    if not index_path.exists():
        raise PtqError(
            f"{path} is not a diffusers pipeline directory (no model_index.json). Expected a Wan 2.2 pipeline in diffusers layout, a hub id such as Wan-AI/Wan2.2-T2V-A14B-Diffusers, or `tiny`."
        )
    index = _require(read_json(index_path), index_path, "_class_name")
    experts = {}
    for name in EXPERTS:
        if (index.get(name) or [None, None])[1] is None:
            continue
        config_path = path / name / "config.json"
        config = _require(read_json(config_path), config_path, "_class_name")
        if config.get("_class_name") != "WanTransformer3DModel":
            raise PtqError(f"{path / name} is a {config.get('_class_name')}; expected a WanTransformer3DModel.")
        experts[name] = _require(config, config_path, *CONFIG_KEYS)
    if not experts:
        raise PtqError(f"{index_path} lists no transformer. Expected a Wan 2.2 pipeline.")
    variant = _detect_variant(index, experts)
    return ModelLayout(path, experts, index["_class_name"], _read_preset(path, variant), index.get("boundary_ratio"))


def _require(value: Any, path: Path, *keys: str) -> dict[str, Any]:
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise DamagedFileError(
            f"{path} should hold a JSON object with {', '.join(keys)}; it lacks {', '.join(missing)}."
        )
    return value


def _detect_variant(index: dict[str, Any], experts: dict[str, dict[str, Any]]) -> str:
    if index.get("expand_timesteps"):
        return "TI2V-5B"
    first = next(iter(experts.values()))
    return "I2V-A14B" if first["in_channels"] != first["out_channels"] else "T2V-A14B"


def _read_preset(path: Path, variant: str) -> ModelPreset:
    own = path / PRESET_FILE
    if own.exists():
        return validate(ModelPreset, read_json(own), str(own))
    return load_preset(variant)
