"""`solver.tune` of a recipe: how the codes of a block are tuned together, after those of each input were solved."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST = 2**31 - 1
"""What a count in a recipe may be."""


class Strict(BaseModel):
    """A group of keys of a recipe: no others, no other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TuneSettings(Strict):
    """What `ptq.quantization.tune` does.

    Attributes:
        steps: gradient steps a block.
        lr: how far a weight moves in a step at first, in steps of its grid; falls to 0 along a cosine.
        prompts: so many calibration prompts take part at most, the first ones, those held out included; None: all.
    """

    steps: int = Field(default=80, ge=1, le=100_000)
    lr: float = Field(default=0.004, gt=0, le=0.1)
    prompts: int | None = Field(default=None, ge=2, le=MOST)

    def describe(self) -> str:
        """What was done, for the report."""
        return f"Afterwards the codes of all layers of a block were tuned together on what the block returns: the values that they were rounded from moved by {self.steps} steps of Adam, the first of {self.lr:g} of a quantization step each, falling to nothing along a cosine. Scales, bases and biases stayed; gradients passed all roundings straight through; the loss is the squared distance to what the original block returns, both on the original model's hidden states. Records of prompts that were held out decided whether a block keeps the tuned codes."


def _switched(value: Any) -> Any:
    if isinstance(value, bool):
        return {} if value else None
    if value is not None and not isinstance(value, dict | TuneSettings):
        raise ValueError("should be true, false or a group of steps, lr and prompts")
    return value


Tuning = Annotated[TuneSettings | None, BeforeValidator(_switched)]
"""None: codes are not tuned. In a recipe `true` is every default and `false` None."""
