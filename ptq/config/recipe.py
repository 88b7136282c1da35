"""Recipes: all that decides the codes, in one strict YAML file; each ingredient is a key that can be switched off.

A recipe is data: `configs/recipes/*.yaml` are installed with the package, a user's own file has the same keys, and
`--set key=value` changes single keys ("gptq.damping=0.05"). The resolved recipe is stored in the checkpoint's manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from ptq.config.load import CONFIGS, list_configs, load_yaml, validate
from ptq.errors import UsageError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GptqSettings(_Strict):
    """GPTQ rounding (arXiv 2210.17323) in the transformed space, with static groups.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of its mean; grows tenfold (counted) when not enough.
        act_order: round columns by descending Hessian diagonal.
        precision: of the factorisation.
    """

    damping: float = Field(default=0.03, gt=0, le=1)
    act_order: bool = True
    precision: Literal["float32", "float64"] = "float32"


class ActivationSettings(_Strict):
    """Dynamic quantization of the inputs; None is the format's default rule."""

    scale_rule: str | None = None
    ties: Literal["even", "away"] | None = None


class RecordSettings(_Strict):
    """How the calibration records are used.

    Attributes:
        weighting: weight of a record in statistics: d_sigma2 (what an error there adds to the final latent) or uniform.
        inputs: the stream that feeds the statistics: of the original model, or propagated through quantized blocks.
        tokens_per_record: tokens sampled from each record for the searches.
        hessian_tokens: tokens sampled from each record for the Hessians, weighted up to stand for all; None: all.
        for_report: records of each expert that are replayed where the codes take nothing from records: those of plain
            rounding only serve the errors in the report.
    """

    weighting: Literal["d_sigma2", "uniform"] = "d_sigma2"
    inputs: Literal["original", "propagated"] = "original"
    tokens_per_record: int = Field(default=128, gt=0)
    hessian_tokens: int | None = Field(default=None, gt=0)
    for_report: int = Field(default=2, gt=0)


class Recipe(_Strict):
    """One way to turn weights and records into 4-bit codes.

    Attributes:
        description: one line for people.
        format: the format it was tuned for; None fits both.
        rounding: rtn or gptq.
        rotation: size of the blocks that are rotated (Hadamard, or learned), 0 for none.
        smoothing: exponents alpha tried for each distinct input besides "off"; empty for no smoothing.
        learned_transform: also try, for each distinct input, blocks learned from its second moments and the weights'
            (`ptq.solvers.learned`); every layer then stores its blocks instead of a smoothing vector.
        clip_search: search the group scales instead of taking the format's rule.
        bias_correction: move the mean output error into the bias.
    """

    description: str = ""
    format: Literal["mxfp4", "hif4"] | None = None
    rounding: Literal["rtn", "gptq"] = "rtn"
    rotation: Literal[0, 16, 32, 64, 128] = 0
    smoothing: tuple[float, ...] = ()
    learned_transform: bool = False
    clip_search: bool = False
    bias_correction: bool = False
    weight_scale_rule: str | None = None
    gptq: GptqSettings = GptqSettings()
    activations: ActivationSettings = ActivationSettings()
    records: RecordSettings = RecordSettings()

    @property
    def needs_records(self) -> bool:
        """Whether the codes depend on calibration records."""
        return bool(self.needs_hessian or self.smoothing or self.bias_correction)

    @property
    def record_limit(self) -> int | None:
        """How many records of each expert are replayed; None: all."""
        return None if self.needs_records else self.records.for_report

    @property
    def needs_hessian(self) -> bool:
        """Whether any ingredient reads the Hessians of the inputs."""
        return self.rounding == "gptq" or self.learned_transform or self.clip_search


def load_recipe(name_or_file: str, format_name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Resolve --recipe and --set into a recipe for one format.

    Args:
        name_or_file: a name in configs/recipes, or a YAML file.
        format_name: "mxfp4" or "hif4".
        overrides: "key=value" or "group.key=value"; values are YAML.

    Raises:
        UsageError: no such recipe, unknown key, wrong value, or a recipe made for the other format.
    """
    path = CONFIGS / "recipes" / f"{name_or_file}.yaml"
    if not path.exists():
        path = Path(name_or_file)
        if not path.exists():
            known = ", ".join(list_configs("recipes"))
            raise UsageError(f"There is no recipe {name_or_file!r}: neither a file nor one of {known}.")
    value = load_yaml(path)
    for override in overrides:
        _apply(value, override)
    recipe = validate(Recipe, value, f"Recipe {name_or_file}")
    if recipe.format not in (None, format_name):
        raise UsageError(
            f"Recipe {name_or_file} is made for {recipe.format}, but --format is {format_name}. Choose another recipe, or copy it and change its `format` key."
        )
    return recipe


def _apply(value: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise UsageError(f"--set takes key=value, found {override!r}.")
    *groups, last = key.strip().split(".")
    for group in groups:
        value = value.setdefault(group, {})
        if not isinstance(value, dict):
            raise UsageError(f"--set {override}: {group} is not a group of keys.")
    try:
        value[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: the value is not valid YAML: {error}") from error
