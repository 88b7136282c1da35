"""What a pipeline directory holds, read from its JSON files: the one value that the rest of the package asks.

Directories of other models, relatives of the family among them, are refused here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.config.load import validate
from ptq.errors import PtqError, UsageError
from ptq.store.files import read_json
from ptq.store.schema import parse
from ptq.wan.block import BlockInput, block_inputs, check_size, width
from ptq.wan.foreign import refuse_method, refuse_no_pipeline, refuse_relative
from ptq.wan.presets import BOUNDARY, PRESET_FILE, RUN_SETTINGS, ModelPreset, load_preset, named_settings
from ptq.wan.schema import PARTS, ExpertConfig, PipelineIndex, SchedulerConfig, VaeConfig
from ptq.wan.variants import (
    EXPERTS,
    IMAGE_PIPELINE,
    SUPPORTED,
    TEXT_PIPELINE,
    TRANSFORMER_CLASS,
    VARIANTS,
    Variant,
    recognise,
    structure_of,
)

OWN_METHOD = "ptq"
"""`quant_method` of this package's checkpoints (`ptq.checkpoint.quantization_config`, which brings torch)."""
ADVICE = "Download or copy the model again."
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
        components: name -> (library, class) of everything that model_index.json names.
    """

    path: Path
    variant: Variant
    experts: dict[str, dict[str, Any]]
    pipeline_class: str
    preset: ModelPreset
    boundary_ratio: float | None
    components: dict[str, tuple[str, str]] = field(default_factory=dict)

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

    def resolve_preset(self, *, named: str | None = None, **given: object) -> ModelPreset:
        """The preset with what the user gave (None: nothing) in its places, and with what follows from that.

        `named` is a name of `named_settings`, whose values stand where the user gave none.

        Where the variant's flow shift depends on the size and none was given, it is chosen by the size and said.

        Raises:
            UsageError: a value that a preset or this model cannot have.
        """
        if named is not None:
            given = self._named(named) | {name: value for name, value in given.items() if value is not None}
        if given.get("guidance_scale_2") is not None and self.boundary_ratio is None:
            raise UsageError("This model has one expert; leave out --guidance-scale-2.")
        preset = self.preset.with_overrides(**given)
        self._check_size(preset)
        second = preset.guidance_scale if preset.guidance_scale_2 is None else preset.guidance_scale_2
        preset = preset.model_copy(update={"guidance_scale_2": None if self.boundary_ratio is None else second})
        if self.variant.image_dim is not None and preset.max_sequence_length != IMAGE_MODEL_TEXT_TOKENS:
            raise UsageError(
                f"{self.variant.title} reads exactly {IMAGE_MODEL_TEXT_TOKENS} text tokens, found {preset.max_sequence_length}; {'leave out --max-sequence-length' if given.get('max_sequence_length') else f'correct max_sequence_length in {self.path / PRESET_FILE}'}."
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

    def _named(self, name: str) -> dict[str, Any]:
        """The settings of that name that a preset of this model can have."""
        settings = {key: value for key, value in named_settings(name).items() if key not in RUN_SETTINGS}
        boundary = settings.pop(BOUNDARY, self.boundary_ratio)
        if boundary != self.boundary_ratio:
            ui.warn(
                f"Preset {name} is for models that change experts at {boundary:g}; this one {'has one expert' if self.boundary_ratio is None else f'does at {self.boundary_ratio:g}'}. Scores are not comparable with published ones."
            )
        if self.boundary_ratio is None:
            settings.pop("guidance_scale_2", None)
        return settings

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """Shape [C, T, H, W] of the latents of a video that the model can make."""
        stride, period = self._strides()
        channels = next(iter(self.experts.values()))["out_channels"]
        return channels, (num_frames - 1) // period + 1, height // stride, width // stride

    def _strides(self) -> tuple[int, int]:
        """Of the VAE, in space and in time."""
        vae = self.path / "vae" / "config.json"
        found = parse(VaeConfig, read_json(vae), vae, ADVICE) if vae.is_file() else None
        return (found and found.scale_factor_spatial) or 8, (found and found.scale_factor_temporal) or 4

    def _check_size(self, preset: ModelPreset) -> None:
        stride, period = self._strides()
        patch = next(iter(self.experts.values()))["patch_size"]
        check_size(preset.height, preset.width, preset.num_frames, stride, period, patch)


def read_layout(path: str | Path) -> ModelLayout:
    """Read a Wan pipeline directory's JSON files and compare them with each other; weights need not be there.

    Raises:
        PtqError: not a diffusers pipeline, not one of the variants, made by another tool, or files that contradict each
            other; names file and key.
    """
    path = Path(path)
    index_path = path / "model_index.json"
    if not index_path.is_file():
        if path.exists():
            refuse_no_pipeline(path)
        raise PtqError(f"{path} does not exist. Pass a pipeline directory of Wan 2.2 or 2.1.")
    content = read_json(index_path)
    pipeline_class = content.get("_class_name") if isinstance(content, dict) else None
    if isinstance(pipeline_class, str) and pipeline_class not in (TEXT_PIPELINE, IMAGE_PIPELINE):
        refuse_relative(path, pipeline_class)
        raise PtqError(f"{index_path} names the pipeline {pipeline_class[:80]}. {SUPPORTED}.")
    index = parse(PipelineIndex, content, index_path, ADVICE)
    components = index.components
    if not set(EXPERTS) & set(components):
        raise PtqError(f"{index_path} lists no transformer. {SUPPORTED}.")
    _compare_experts(path, index, components)
    experts = {name: _read_expert(path / name) for name in EXPERTS if name in components}
    for name, schema in PARTS.items():
        if name in components and (path / name / "config.json").is_file():
            _read_part(path / name, schema)
    _check_scheduler(path / "scheduler" / "scheduler_config.json", components["scheduler"][1])
    _compare_structure(path, experts)
    variant, preset = _identify(path, structure_of(content, experts), next(iter(experts.values())))
    if preset.guidance_scale_2 is not None and len(experts) == 1:
        raise PtqError(
            f'{path / PRESET_FILE} has "guidance_scale_2": {preset.guidance_scale_2:g}, but the model has one expert. Set it to null.'
        )
    return ModelLayout(path, variant, experts, index.class_name, preset, index.boundary_ratio, components)


def _compare_experts(path: Path, index: PipelineIndex, components: Mapping[str, object]) -> None:
    """The experts that model_index.json names, those that lie there, and its boundary_ratio."""
    where = path / "model_index.json"
    first, second = EXPERTS
    if first not in components:
        raise PtqError(
            f"{where} names {second} but no {first}. A model of one expert calls it {first}; correct the index, or copy the model again."
        )
    if second not in components and (path / second).is_dir():
        raise PtqError(
            f'{where} has "{second}": null, but {path / second} is there. Correct the index, or remove the folder where the model has one expert.'
        )
    if (second in components) != (index.boundary_ratio is not None):
        has = "two experts" if second in components else "one expert"
        raise PtqError(
            f'{where} has "boundary_ratio": {"null" if index.boundary_ratio is None else index.boundary_ratio}, but names {has} ("{second}"). With two experts it says where the second takes over, with one it is null; copy the index of the original model.'
        )


def _read_expert(folder: Path) -> dict[str, Any]:
    """config.json of an expert, checked; as it stands, because digests are taken over it."""
    where = folder / "config.json"
    config = read_json(where)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if isinstance(kind, str):
        refuse_relative(folder.parent, kind, *config, "flf2v" if config.get("pos_embed_seq_len") else "")
        if kind != TRANSFORMER_CLASS:
            raise PtqError(f"{folder} is a {kind[:80]}; expected a {TRANSFORMER_CLASS}. {SUPPORTED}.")
    _refuse_other_tools(folder, config)
    parse(ExpertConfig, config, where, ADVICE)
    return dict(config)


def _read_part(folder: Path, schema: type) -> None:
    config = read_json(folder / "config.json")
    _refuse_other_tools(folder, config, own=None)
    parse(schema, config, folder / "config.json", ADVICE)


def _refuse_other_tools(folder: Path, config: object, own: str | None = OWN_METHOD) -> None:
    if not isinstance(config, dict) or "quantization_config" not in config:
        return
    quantization = config["quantization_config"]
    if not isinstance(quantization, dict) or quantization.get("quant_method") != own or own is None:
        refuse_method(folder, quantization)


def _check_scheduler(where: Path, kind: str) -> None:
    """Wan predicts the flow, and the pipeline never tells a scheduler the size of its video.

    Raises:
        PtqError: another prediction, or a shift that depends on the size.
    """
    config = parse(SchedulerConfig, read_json(where), where, ADVICE)
    wanted = {} if kind.startswith("FlowMatch") else {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for key, value in wanted.items():
        found = getattr(config, key)
        if found != value:
            raise PtqError(
                f"{where} has {key} = {found!r}; Wan predicts the flow, so {kind} needs {key} = {value!r}. Copy the scheduler of the original model."
            )
    if config.use_dynamic_shifting:
        raise PtqError(
            f"{where} has use_dynamic_shifting = True; Wan's pipelines have one flow shift for all sizes. Set it to false, or copy the scheduler of the original model."
        )
    if config.flow_shift is None and config.shift is None:
        raise PtqError(
            f"{where} has neither flow_shift nor shift, so {kind} cannot be given the model's. Copy the scheduler of the original model."
        )


def _compare_structure(path: Path, experts: Mapping[str, Mapping[str, Any]]) -> None:
    """Two experts are of one structure: the same latents, text and image go into both."""
    first, *others = experts
    for second in others:
        pair = [ExpertConfig.model_validate(experts[name]) for name in (first, second)]
        for key in ExpertConfig.model_fields:
            before, after = (getattr(config, key) for config in pair)
            if before != after:
                raise PtqError(
                    f'{path / second}/config.json has "{key}": {after}, but {path / first}/config.json has {before}. The two experts are not of one model; copy both from one release.'
                )


def _identify(path: Path, structure: str, config: Mapping[str, Any]) -> tuple[Variant, ModelPreset]:
    """The variant that the directory's own preset names, else the one that its files show; and the preset."""
    found = recognise(structure, width(config))
    own = path / PRESET_FILE
    preset = validate(ModelPreset, read_json(own), str(own)) if own.exists() else None
    if found is None:
        raise PtqError(f"{path} is none of the variants that are known: {structure}. {SUPPORTED}.")
    exact = tuple(config[key] for key in ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers"))
    is_released = exact == (found.heads, found.head_dim, found.ffn, found.layers)
    if preset is None:
        if not is_released:
            ui.warn(
                f"{path} has the structure of {found.title}, but another size; it gets the defaults of {found.name}."
            )
        return found, load_preset(found.name)
    named = VARIANTS[preset.variant]
    if structure not in named.structures:
        raise PtqError(
            f'{own} says "variant": "{named.name}" ({named.structures[0]}), but the directory has {structure}, as {found.title}. Correct the variant, or delete the file to take the defaults of {found.name}; a packed checkpoint made under the wrong variant has to be quantized again.'
        )
    if is_released and named is not found:
        raise PtqError(
            f'{own} says "variant": "{named.name}", but transformer/config.json has the size of {found.title} ({found.heads} heads of {found.head_dim}, {found.layers} blocks). Correct the variant, or delete the file to take the defaults of {found.name}.'
        )
    return named, preset
