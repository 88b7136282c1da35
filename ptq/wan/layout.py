"""What a pipeline directory holds, read from its JSON files: the one value that the rest of the package asks.

Directories of other models, relatives of the family among them, are refused here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.config.load import validate
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.store.files import read_json
from ptq.wan.block import BlockInput, block_inputs, width
from ptq.wan.presets import PRESET_FILE, ModelPreset, load_preset
from ptq.wan.variants import (
    EXPERTS,
    IMAGE_PIPELINE,
    SUPPORTED,
    TEXT_PIPELINE,
    TRANSFORMER_CLASS,
    VARIANTS,
    Variant,
    recognise,
    relative_of,
    structure_of,
)

CONFIG_KEYS = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels", "out_channels")
"""What this package reads from a transformer's config.json."""
IMAGE_MODEL_TEXT_TOKENS = 512
"""Text tokens of models whose blocks read image tokens: their attention splits its context at this fixed number."""


@dataclass(frozen=True)
class ModelLayout:
    """What a Wan pipeline directory holds, read from its JSON files only.

    Attributes:
        path: the pipeline directory.
        variant: which member of the family it is.
        experts: expert name -> its transformer's config.json.
        pipeline_class: class name in model_index.json.
        preset: generation defaults.
        boundary_ratio: timesteps at or above boundary_ratio * 1000 go to `transformer`; None with one expert.
    """

    path: Path
    variant: Variant
    experts: dict[str, dict[str, Any]]
    pipeline_class: str
    preset: ModelPreset
    boundary_ratio: float | None

    def num_blocks(self, expert: str) -> int:
        """Number of transformer blocks of an expert."""
        return int(self.experts[expert]["num_layers"])

    def width(self, expert: str) -> int:
        """Inner dimension of an expert: channels of its hidden states."""
        return width(self.experts[expert])

    def block_inputs(self, expert: str) -> dict[str, BlockInput]:
        """Distinct input of a block of this expert -> the Linears that read it, their shapes, what its rows are."""
        return block_inputs(self.experts[expert])

    def linear_shapes(self, expert: str) -> dict[str, tuple[int, int]]:
        """(N, K) of each Linear of a block of this expert."""
        return {name: (item.n, item.k) for item in self.block_inputs(expert).values() for name in item.linears}

    @property
    def is_packed(self) -> bool:
        """Whether the experts are already a packed checkpoint of this package."""
        return any(config.get("quantization_config") for config in self.experts.values())

    @property
    def needs_image(self) -> bool:
        """Whether every video starts from a picture."""
        return self.pipeline_class == IMAGE_PIPELINE

    def starts_from_image(self, asked: bool) -> bool:
        """Whether a run is image-to-video: always where the model needs a picture, else where the user asks for it.

        Raises:
            UsageError: asked for, but the model cannot.
        """
        if asked and not self.needs_image and self.variant.image == "none":
            raise UsageError(f"{self.path} is a text-to-video model; it cannot start from an image.")
        return asked or self.needs_image

    def resolve_preset(self, **given: object) -> ModelPreset:
        """The preset with what the user gave (None: nothing) in its places, and with what follows from that.

        Where the variant's flow shift depends on the size and none was given, it is chosen by the size and said.

        Raises:
            UsageError: a value that a preset or this model cannot have.
        """
        if given.get("guidance_scale_2") is not None and self.boundary_ratio is None:
            raise UsageError("This model has one expert; leave out --guidance-scale-2.")
        preset = self.preset.with_overrides(**given)
        second = preset.guidance_scale if preset.guidance_scale_2 is None else preset.guidance_scale_2
        preset = preset.model_copy(update={"guidance_scale_2": None if self.boundary_ratio is None else second})
        if self.variant.image_dim is not None and preset.max_sequence_length != IMAGE_MODEL_TEXT_TOKENS:
            raise UsageError(
                f"{self.variant.title} reads exactly {IMAGE_MODEL_TEXT_TOKENS} text tokens, found {preset.max_sequence_length}; leave out --max-sequence-length."
            )
        if self.variant.flow_shifts is None or given.get("flow_shift") is not None:
            return preset
        own = self.variant.flow_shift(self.preset.height, self.preset.width)
        chosen = self.variant.flow_shift(preset.height, preset.width)
        shift = preset.flow_shift if chosen == own else chosen
        ui.info(
            f"Flow shift {shift:g} for {preset.width}x{preset.height} ({self.variant.title}); --flow-shift changes it."
        )
        return preset.model_copy(update={"flow_shift": shift})


def read_layout(path: str | Path) -> ModelLayout:
    """Read and check a Wan pipeline directory.

    Raises:
        PtqError: not a diffusers pipeline, not one of the variants, or a part is missing; says what was expected.
    """
    path = Path(path)
    index_path = path / "model_index.json"
    if not index_path.exists():
        raise PtqError(
            f"{path} is not a diffusers pipeline directory (no model_index.json). Expected a pipeline of Wan 2.2 or 2.1 in diffusers layout, a hub id such as Wan-AI/Wan2.2-T2V-A14B-Diffusers, or `tiny`."
        )
    index = _require(read_json(index_path), index_path, "_class_name")
    pipeline_class = index["_class_name"]
    if pipeline_class not in (TEXT_PIPELINE, IMAGE_PIPELINE):
        refuse_relative(path, pipeline_class)
        raise PtqError(f"{index_path} names the pipeline {pipeline_class}. {SUPPORTED}.")
    experts = {}
    for name in EXPERTS:
        if (index.get(name) or [None, None])[1] is None:
            continue
        config_path = path / name / "config.json"
        config = _require(read_json(config_path), config_path, "_class_name")
        refuse_relative(path, config["_class_name"], *config, "flf2v" if config.get("pos_embed_seq_len") else "")
        if config["_class_name"] != TRANSFORMER_CLASS:
            raise PtqError(f"{path / name} is a {config['_class_name']}; expected a {TRANSFORMER_CLASS}. {SUPPORTED}.")
        experts[name] = _require(config, config_path, *CONFIG_KEYS)
    if not experts:
        raise PtqError(f"{index_path} lists no transformer. {SUPPORTED}.")
    variant, preset = _identify(path, structure_of(index, experts), next(iter(experts.values())))
    return ModelLayout(path, variant, experts, pipeline_class, preset, index.get("boundary_ratio"))


def refuse_relative(path: Path, *names: Any) -> None:
    """Refuse a relative of the family that class names, configuration keys or a model type give away.

    Raises:
        PtqError: it is one; names it.
    """
    relative = relative_of(*names)
    if relative is not None:
        raise PtqError(
            f"{path} is a Wan {relative} model, which has blocks or inputs that are not known here and would be left out. {SUPPORTED}."
        )


def _require(value: Any, path: Path, *keys: str) -> dict[str, Any]:
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise DamagedFileError(
            f"{path} should hold a JSON object with {', '.join(keys)}; it lacks {', '.join(missing)}."
        )
    return value


def _identify(path: Path, structure: str, config: Mapping[str, Any]) -> tuple[Variant, ModelPreset]:
    """The variant that the directory's own preset names, else the one that its files show; and the preset."""
    found = recognise(structure, width(config))
    own = path / PRESET_FILE
    preset = validate(ModelPreset, read_json(own), str(own)) if own.exists() else None
    if found is None:
        raise PtqError(f"{path} is none of the variants that are known: {structure}. {SUPPORTED}.")
    if preset is None:
        size = tuple(int(config[key]) for key in ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers"))
        if size != (found.heads, found.head_dim, found.ffn, found.layers):
            ui.warn(
                f"{path} has the structure of {found.title}, but another size; it gets the defaults of {found.name}."
            )
        return found, load_preset(found.name)
    named = VARIANTS[preset.variant]
    if structure not in named.structures:
        raise PtqError(
            f'{own} says "variant": "{named.name}" ({named.structures[0]}), but the directory has {structure}, as {found.title}. Correct the variant, or delete the file to take the defaults of {found.name}; a packed checkpoint made under the wrong variant has to be quantized again.'
        )
    return named, preset
