"""Presets: the generation defaults of each variant. Every value can be overridden on the command line.

Sources: the model cards and the original repository's configuration files, as listed in docs/guide.md.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ptq.config.load import CONFIGS, list_configs, load_yaml, validate
from ptq.errors import UsageError, shown
from ptq.wan.variants import VARIANTS

PRESET_FILE = "ptq_preset.json"
"""A model directory may carry its own preset under this name (the embedded, the random and the packed models do)."""


SAMPLING = (
    "height",
    "width",
    "num_frames",
    "steps",
    "flow_shift",
    "guidance_scale",
    "guidance_scale_2",
    "negative_prompt",
    "max_sequence_length",
)
"""Fields of a preset that decide what a denoiser is called with: records are made with them, and carry them on."""


class ModelPreset(BaseModel):
    """Defaults of one variant. Sizes in pixels, `fps` in frames a second."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    variant: str
    hub_id: str | None = None
    height: int = Field(gt=0, le=2**14)
    width: int = Field(gt=0, le=2**14)
    num_frames: int = Field(gt=0, le=10**5)
    fps: int = Field(gt=0, le=1000)
    steps: int = Field(gt=0, le=10**4)
    flow_shift: float = Field(gt=0, le=10**4)
    guidance_scale: float
    guidance_scale_2: float | None = None
    negative_prompt: str = ""
    max_sequence_length: int = Field(default=512, gt=0, le=10**5)

    @field_validator("variant")
    @classmethod
    def _known(cls, variant: str) -> str:
        if variant not in VARIANTS:
            raise ValueError(f"should be one of {', '.join(VARIANTS)}")
        return variant

    def sampling(self) -> dict[str, Any]:
        """The fields of `SAMPLING`."""
        return {name: getattr(self, name) for name in SAMPLING}

    @property
    def guided(self) -> bool:
        """Whether the sampler also calls the unconditional branch at each step."""
        return self.guidance_scale > 1.0

    @property
    def calls(self) -> int:
        """Denoiser calls of one video."""
        return self.steps * (2 if self.guided else 1)

    def with_overrides(self, **values: object) -> ModelPreset:
        """This preset with the values that are not None in their places.

        Raises:
            UsageError: a value that a preset cannot have.
        """
        given = {name: value for name, value in values.items() if value is not None}
        return validate(ModelPreset, self.model_dump() | given, "The settings on the command line")


BOUNDARY = "boundary_ratio"
RUN_SETTINGS = ("seed", "seed_scheme")
"""What a named preset may say besides fields of `ModelPreset`: of the seeds of `ptq generate`."""


def named_settings(name: str) -> dict[str, Any]:
    """Settings that are known under a name (`configs/presets/*.yaml`), for models of any variant: fields of `ModelPreset`,
    `RUN_SETTINGS`, and the `BOUNDARY` of the models that they are for.

    Raises:
        UsageError: no such name.
    """
    if name not in list_configs("presets"):
        raise UsageError(f"There is no preset {shown(name)}; choose one of {', '.join(list_configs('presets'))}.")
    return dict(load_yaml(CONFIGS / "presets" / f"{name}.yaml"))


def run_settings(name: str | None) -> dict[str, Any]:
    """Those of `RUN_SETTINGS` that a named preset has; {} without one. Errors as `named_settings`."""
    settings = {} if name is None else named_settings(name)
    return {key: settings[key] for key in RUN_SETTINGS if key in settings}


def load_preset(variant: str) -> ModelPreset:
    """The preset of a variant, by its name.

    Raises:
        UsageError: no such variant.
    """
    if variant not in VARIANTS:
        raise UsageError(f"Unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}.")
    path = CONFIGS / "models" / f"{variant.lower()}.yaml"
    return validate(ModelPreset, load_yaml(path), str(path))
