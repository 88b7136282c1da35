"""Recipes: all that decides the codes, in one strict YAML file; each ingredient is a key that can be switched off.

A recipe is data in three parts: how layers are quantized (`scheme`), how weights are rounded (`solver`), how calibration
records are used (`records`). `configs/recipes/*.yaml` are installed with the package, a user's own file has the same keys, and
`--set key=value` changes single keys ("solver.damping=0.05"). The resolved recipe is stored in the checkpoint's manifest.
Every default stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ptq.config.load import CONFIGS, list_configs, load_yaml, validate
from ptq.config.overrides import apply_override, key_of, refuse_undone
from ptq.config.tuning import MOST, Strict, Tuning
from ptq.errors import UsageError, shown


class SchemeSettings(Strict):
    """How every layer is quantized, beside the format.

    Attributes:
        transform: kind of the change of basis: none, hadamard, smoothed, learned (`ptq.scheme`).
        block: size of its blocks; for a K that it does not divide, the largest power of two that does. 0 smooths without
            rotating, none has no blocks.
        input_rule: scale rule of the dynamic quantization of inputs; None: the format's default.
    """

    transform: str = "none"
    block: int = Field(default=64, ge=0, le=MOST)
    input_rule: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_blocks_without_transform(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("transform", "none") == "none":
            return {**value, "block": 0}
        return value

    def describe(self) -> str:
        """What happens to an input at run time."""
        rule = f"rule {self.input_rule}" if self.input_rule else "the format's default rule"
        return f"Every token's input is quantized when it arrives, each group with its own scale ({rule})."


class SolverSettings(Strict):
    """How a weight becomes codes, in the transformed space.

    Attributes:
        rounding: rtn (to nearest) or gptq (arXiv 2210.17323, with static groups).
        smoothing: exponents alpha tried for each distinct input besides "off", by the transforms that can smooth.
        clip_search: search the group scales instead of taking the format's rule.
        weight_rule: the format's scale rule for weights; None: its default. Where scales are searched it counts if it has
            scales of a kind of its own, among which they then are (HiF4's p2: powers of two).
        damping: added to the Hessian's diagonal, as a share of its mean; grows tenfold (counted) when not enough.
        act_order: round columns by descending Hessian diagonal.
        residual: share of an expert's products, N x K of each Linear, that residual blocks may add; which ones is chosen on the
            records. 0: none.
        tune: tune the codes of each block on what it returns; None: do not. `true` is every default of it.
    """

    rounding: Literal["rtn", "gptq"] = "rtn"
    smoothing: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(), strict=False, max_length=64)
    clip_search: bool = False
    weight_rule: str | None = None
    damping: float = Field(default=0.03, gt=0, le=1)
    act_order: bool = True
    residual: float = Field(default=0.0, ge=0, le=0.5)
    tune: Tuning = None

    @property
    def needs_hessian(self) -> bool:
        """Whether the Hessians of the inputs are read."""
        return self.rounding == "gptq" or self.clip_search

    @property
    def needs_records(self) -> bool:
        """Whether anything is taken from the calibration records."""
        return self.needs_hessian or self.residual > 0 or self.tune is not None

    @model_serializer(mode="wrap")
    def _as_before_there_was_tuning(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `tune` where it is off: what earlier runs and manifests hold is the same."""
        value: dict[str, Any] = dump(self)
        return {key: one for key, one in value.items() if key != "tune" or one is not None}

    def describe(self) -> str:
        """How weights are rounded."""
        if self.rounding == "rtn":
            return "Weights are rounded to the nearest number of the format."
        order = "in the order of falling Hessian diagonal" if self.act_order else "in their natural order"
        return f"Columns are rounded one after another, {order}, on the format's own grid with fixed scales; each error is pushed onto the columns still to come (arXiv 2210.17323). Damping {self.damping:g} of the mean diagonal"

    def describe_residual(self) -> str:
        """What residual blocks are; empty where there are none."""
        if not self.residual:
            return ""
        return f"Of the inputs' blocks of 64 channels whose quantization noise costs most, what rounding left is quantized once more in the same format and multiplied with the same weight codes: two 4-bit words for these channels, for at most {self.residual:.1%} more products of an expert, counted for one row of each input. Ranked on the records: noise of the block through the weight's columns, times what an error of these layers does to the block's output, for each product."


class RecordSettings(Strict):
    """How the calibration records are used; all weigh the same.

    Attributes:
        tokens_per_record: tokens sampled from each record for the searches.
        hessian_tokens: tokens sampled from each record for the Hessians, weighted up to stand for all; None: all.
        for_report: records of each expert that are replayed where the codes take nothing from records: those of plain
            rounding only serve the errors in the report.
    """

    tokens_per_record: int = Field(default=128, gt=0, le=MOST)
    hessian_tokens: int | None = Field(default=None, gt=0, le=MOST)
    for_report: int = Field(default=2, gt=0, le=MOST)

    def describe(self) -> str:
        """How the records are replayed."""
        tokens = "all tokens" if self.hessian_tokens is None else f"{self.hessian_tokens} tokens of each record"
        return f"The records are replayed through the experts one block at a time, so that one block's weights are in memory. Statistics of a block's inputs are taken from the original model's hidden states ({tokens}); each record weighs the same."


class Recipe(Strict):
    """One way to turn weights and records into 4-bit codes.

    Attributes:
        description: one line for people.
        format: the format it was tuned for; None fits all.
    """

    description: str = ""
    format: str | None = None
    scheme: SchemeSettings = SchemeSettings()
    solver: SolverSettings = SolverSettings()
    records: RecordSettings = RecordSettings()

    def describe_inputs(self) -> str:
        """What happens to an input at run time, and that nothing else does; residual blocks apart."""
        nothing = "" if self.solver.residual else " Nothing is calibrated or kept in higher precision."
        return f"{self.scheme.describe()}{nothing}"


GROUPS = tuple(name for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields"))
"""Of keys in a recipe."""
NOW_CALLED = {
    "rounding": "solver.rounding",
    "smoothing": "solver.smoothing",
    "clip_search": "solver.clip_search",
    "weight_scale_rule": "solver.weight_rule",
    "gptq.damping": "solver.damping",
    "gptq.act_order": "solver.act_order",
    "rotation": "scheme.block",
    "activations.scale_rule": "scheme.input_rule",
    "learned_transform": "scheme.transform",
}
"""Keys of recipes from before they had groups -> today's."""
GONE = {
    "gptq.precision": "float32",
    "activations.ties": None,
    "records.weighting": "uniform",
    "records.inputs": "original",
    "bias_correction": False,
}
"""Keys that measured as dominated and are no more -> the value that is what happens now."""


def translate(earlier: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe as manifests held it before recipes had groups -> the same as today's keys, and what cannot be said with them.

    A recipe of today comes back as it is.
    """
    flat = _flatten(earlier)
    if not any(key in flat for key in (*NOW_CALLED, *GONE)):
        return dict(earlier), {}
    if any(not isinstance(earlier.get(group, {}), Mapping) for group in GROUPS):
        return dict(earlier), {}  # neither of today nor of then: strict validation says why
    idle = set() if _read_records(flat) else {"records.weighting", "records.inputs"}
    idle |= set() if flat.get("rounding") == "gptq" else {"gptq.precision"}
    lost = {key: flat[key] for key, now in GONE.items() if flat.get(key, now) != now and key not in idle}
    value: dict[str, Any] = {"scheme": {}, "solver": {}, "records": {}}
    for key, found in flat.items():
        group, _, name = NOW_CALLED.get(key, key).rpartition(".")
        if key not in GONE and key != "learned_transform":
            keys = value.setdefault(group, {}) if group else value
            if not isinstance(keys, dict):
                return dict(earlier), {}  # "a" and "a.b" in one: strict validation says why
            keys[name] = found
    learned, smoothed = flat.get("learned_transform"), flat.get("smoothing")
    kind = "learned" if learned else "smoothed" if smoothed else "hadamard" if flat.get("rotation") else "none"
    return {**value, "scheme": {**value["scheme"], "transform": kind}}, lost


def _read_records(flat: Mapping[str, Any]) -> bool:
    """Whether a recipe without groups took anything from the calibration records."""
    ingredients = ("learned_transform", "clip_search", "smoothing", "bias_correction")
    return flat.get("rounding") == "gptq" or any(flat.get(key) for key in ingredients)


def installed_recipes() -> dict[str, Recipe]:
    """Name -> recipe, of those that come with the package."""
    names = list_configs("recipes")
    return {name: validate(Recipe, load_yaml(CONFIGS / "recipes" / f"{name}.yaml"), f"Recipe {name}") for name in names}


def load_recipe(name_or_file: str, format_name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Resolve --recipe and --set into a recipe for one format.

    Args:
        name_or_file: a name in configs/recipes, or a YAML file.
        format_name: of the format it is to be used with.
        overrides: "key=value" or "group.key=value"; values are YAML.

    Raises:
        UsageError: no such recipe, unknown key, wrong value, or a recipe made for another format.
    """
    path = CONFIGS / "recipes" / f"{name_or_file}.yaml"
    if not path.exists():
        path = Path(name_or_file)
        if not path.exists():
            known = ", ".join(list_configs("recipes"))
            raise UsageError(f"There is no recipe {shown(name_or_file)}: neither a file nor one of {known}.")
    value, where = load_yaml(path), f"Recipe {name_or_file}"
    _refuse_earlier(value, where)
    refuse_undone(overrides)
    for override in overrides:
        alone: dict[str, Any] = {}
        apply_override(alone, override, GROUPS)
        _refuse_earlier(alone, f"--set {key_of(override)}")
        apply_override(value, override, GROUPS)
    _refuse_idle_block(value, overrides, where)
    recipe = validate(Recipe, value, where, [key_of(override) for override in overrides])
    check_format(recipe, name_or_file, format_name)
    return recipe


def check_format(recipe: Recipe, name: str, format_name: str) -> None:
    """Raise UsageError where a recipe is made for another format."""
    if recipe.format not in (None, format_name):
        raise UsageError(
            f"Recipe {name} is made for {recipe.format}, but the format is {format_name}. Choose another recipe, or copy it and change its `format` key."
        )


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups -> "group.key"."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def _refuse_earlier(value: Mapping[str, Any], where: str) -> None:
    flat = _flatten(value)
    renamed = [f"{key} is now called {new}" for key, new in NOW_CALLED.items() if key in flat]
    gone = [f"{key} is gone: it measured as no gain" for key in GONE if key in flat]
    if {"rotation", "learned_transform"} & flat.keys():
        renamed.append("what used to follow from them is scheme.transform: none, hadamard, smoothed or learned")
    if renamed or gone:
        raise UsageError(
            f"{where} has keys of an earlier version: {'; '.join(renamed + gone)}. The installed recipes ({', '.join(list_configs('recipes'))}) have today's keys."
        )


def _refuse_idle_block(value: Mapping[str, Any], overrides: tuple[str, ...], where: str) -> None:
    """A block size that nothing would use; `--set scheme.transform=none` may leave the recipe's own behind."""
    scheme = value.get("scheme")
    set_keys = {key_of(override) for override in overrides}
    if not isinstance(scheme, dict) or scheme.get("transform", "none") != "none" or not scheme.get("block"):
        return
    if "scheme.block" in set_keys or "scheme.transform" not in set_keys:
        raise UsageError(
            f"{where} asks for blocks of {shown(scheme['block'])} without a transform. Name one in scheme.transform (hadamard, smoothed, learned), or leave scheme.block out."
        )
