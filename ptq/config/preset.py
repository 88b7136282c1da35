"""Model presets: the generation defaults of each Wan 2.2 variant. Every value can be overridden on the command line.

Sources: the model cards and the original repository's configuration files, as listed in docs/guide.md.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ptq.config.load import CONFIGS, list_configs, load_yaml, validate
from ptq.errors import UsageError

PRESET_FILE = "ptq_preset.json"
"""A model directory may carry its own preset under this name (the embedded and the random models do)."""


class ModelPreset(BaseModel):
    """Defaults of one variant. Sizes in pixels, `fps` in frames a second."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: Literal["T2V-A14B", "I2V-A14B", "TI2V-5B"]
    hub_id: str | None = None
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    num_frames: int = Field(gt=0)
    fps: int = Field(gt=0)
    steps: int = Field(gt=0)
    flow_shift: float = Field(gt=0)
    guidance_scale: float
    guidance_scale_2: float | None = None
    negative_prompt: str = ""
    max_sequence_length: int = Field(default=512, gt=0)

    def with_overrides(self, **values: object) -> ModelPreset:
        """This preset with the values that are not None in their places.

        Raises:
            UsageError: a value that a preset cannot have.
        """
        given = {name: value for name, value in values.items() if value is not None}
        return validate(ModelPreset, self.model_dump() | given, "The settings on the command line")


def load_preset(variant: str) -> ModelPreset:
    """The preset of a variant ("T2V-A14B", "I2V-A14B", "TI2V-5B").

    Raises:
        UsageError: no such variant.
    """
    path = CONFIGS / "models" / f"{variant.lower()}.yaml"
    if not path.exists():
        raise UsageError(f"Unknown variant {variant!r}; choose one of {', '.join(list_configs('models'))}.")
    return validate(ModelPreset, load_yaml(path), str(path))
