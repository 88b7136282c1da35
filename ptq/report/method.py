"""The method as this checkpoint's recipe really ran: an ingredient is described only when it was on.

Texts and figures come from the resolved recipe and the per-layer statistics in the manifest; `key` selects the equation
in the PDF's template. A recipe key that is set but that no step here describes is named, never dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ptq.checkpoint.manifest import Manifest
from ptq.config import Recipe
from ptq.report.cells import flatten, plain
from ptq.report.facts import FORMAT_NAMES

FORMAT_TEXT = {
    "mxfp4": "MXFP4 (OCP Microscaling v1.0): groups of 32 values along the input dimension share one power-of-two scale; each value is one of 15 E2M1 numbers. 4.25 bits a value.",
    "hif4": "HiF4 (HiFloat4, arXiv 2602.11287): groups of 64 values along the input dimension share one E6M2 scale; eight bits double single eighths of the group and sixteen bits single fours; each value has a sign and a level from 0 to 7. 4.5 bits a value.",
}
_DESCRIBED = {
    *("description", "format", "rounding", "rotation", "smoothing", "learned_transform", "clip_search"),
    *("bias_correction", "weight_scale_rule", "gptq.damping", "gptq.act_order", "gptq.precision"),
    *("activations.scale_rule", "activations.ties"),
    *("records.weighting", "records.inputs", "records.tokens_per_record"),
}
"""Recipe keys that the steps below speak of."""


@dataclass(frozen=True)
class Step:
    """One ingredient: a name, what was done with the figures of this run, and the key of its equation."""

    key: str
    title: str
    text: str


def describe_method(manifest: Manifest) -> list[Step]:
    """The steps in the order in which they act."""
    recipe = manifest.recipe
    makers: Iterable[Callable[[Manifest, Mapping[str, Any]], Step | None]] = (
        _format, _records, _replay, _smoothing, _rotation, _learned, _scales, _rounding, _bias, _activations,
        _protection, _other,
    )  # fmt: skip
    return [step for maker in makers if (step := maker(manifest, recipe)) is not None]


def _format(manifest: Manifest, recipe: Mapping[str, Any]) -> Step:
    text = FORMAT_TEXT[manifest.format]
    return Step(
        f"format-{manifest.format}", "Number format", f"{text} Weights and inputs of every quantized layer use it."
    )


def _records(manifest: Manifest, recipe: Mapping[str, Any]) -> Step | None:
    calibration = manifest.calibration
    if calibration is None:
        return None
    return Step(
        "records",
        "Recorded inputs",
        f"The original pipeline ran on {len(calibration['samples'])} prompts of {calibration['prompts']['name']}; {calibration['records']} calls of the denoiser were recorded with latents, timestep and text embedding, from steps spread over each expert's range.",
    )


def _replay(manifest: Manifest, recipe: Mapping[str, Any]) -> Step:
    if not Recipe.model_validate({k: v for k, v in recipe.items() if k in Recipe.model_fields}).needs_records:
        text = (
            "Blocks are converted one at a time; the recorded calls are replayed to measure the errors in this report."
        )
        return Step("", "Block by block", f"{text} This recipe takes nothing else from them.")
    records = recipe.get("records", {})
    stream = {
        "original": "the original model's hidden states",
        "propagated": "hidden states that already passed the quantized blocks before it",
    }.get(records.get("inputs"), "hidden states")
    weighted = records.get("weighting") == "d_sigma2"
    how = "its squared noise-level step, because the sampler multiplies an error by it" if weighted else "the same"
    return Step(
        "weighting" if weighted else "",
        "Block by block",
        f"The records are replayed through the experts one block at a time, so that one block's weights are in memory. Statistics of a block's inputs are taken from {stream}; each record weighs {how}.",
    )


def _smoothing(manifest: Manifest, recipe: Mapping[str, Any]) -> Step | None:
    if not recipe.get("smoothing"):
        return None
    tried = ", ".join(f"{alpha:g}" for alpha in recipe["smoothing"])
    return Step(
        "smoothing",
        "Smoothing",
        f"Each input channel is multiplied by a factor and the weight's column divided by it, so that outlier channels shrink (SmoothQuant, arXiv 2211.10438, with root mean squares). Exponents tried for each input: {tried}, and none"
        + ("." if recipe.get("learned_transform") else _kept(manifest)),
    )


def _rotation(manifest: Manifest, recipe: Mapping[str, Any]) -> Step | None:
    block = recipe.get("rotation", 0)
    if not block or recipe.get("learned_transform"):
        return None
    return Step(
        "rotation",
        "Block Hadamard rotation",
        f"Input and weight are rotated by an orthonormal Hadamard matrix in blocks of {block} channels: the layer's output stays the same, an outlier is spread over its block. The weight is rotated once, the input at run time.",
    )


def _learned(manifest: Manifest, recipe: Mapping[str, Any]) -> Step | None:
    if not recipe.get("learned_transform"):
        return None
    return Step(
        "learned",
        "Learned block transform",
        f"Input and weight change their basis in blocks of {recipe['rotation']} channels, by the matrix for which quantization noise costs the layer least, in closed form from the second moments of input and weight (WUSH, arXiv 2512.00956); its last factor is a Hadamard matrix, which spreads outliers. Blocks are stored with 8 bits an entry and applied to the input at run time. Tried for each input beside the Hadamard matrix alone (off)"
        + _kept(manifest),
    )


def _kept(manifest: Manifest) -> str:
    chosen = Counter(row.basis for row in manifest.layers)
    counted = ", ".join(f"{name} for {n}" for name, n in sorted(chosen.items()))
    return f"; kept is the one with the smallest output error with both sides quantized. Chosen over all layers: {counted}."


def _scales(manifest: Manifest, recipe: Mapping[str, Any]) -> Step | None:
    if recipe.get("clip_search"):
        tried = "exponents one below to one above the rule's" if manifest.format == "mxfp4" else (
            "scale codes four below to two above the rule's, micro-exponents free"
        )  # fmt: skip
        return Step(
            "scales",
            "Searched group scales",
            f"The scale of each weight group is the one with the smallest weighted error ({tried}). The stored numbers are plain {FORMAT_NAMES[manifest.format]}.",
        )
    rule = recipe.get("weight_scale_rule")
    return Step("", "Weight scales", f"Weight scales follow the rule {rule}.") if rule else None


def _rounding(manifest: Manifest, recipe: Mapping[str, Any]) -> Step:
    if recipe.get("rounding") != "gptq":
        return Step("rtn", "Rounding to nearest", "Weights are rounded to the nearest number of the format.")
    gptq = recipe.get("gptq", {})
    retries = sum(row.damping_retries for row in manifest.layers)
    kept = sum(row.rows_kept_rtn for row in manifest.layers)
    rows = sum(row.shape[0] for row in manifest.layers)
    order = "in the order of falling Hessian diagonal" if gptq.get("act_order") else "in their natural order"
    return Step(
        "gptq",
        "GPTQ rounding",
        f"Columns are rounded one after another, {order}, on the format's own grid with fixed scales; each error is pushed onto the columns still to come (arXiv 2210.17323). Damping {plain(gptq.get('damping', 0))} of the mean diagonal, raised {retries} times; factorisation in {gptq.get('precision')}. Plain rounding was the better of the two in {kept} of {rows} output rows and was kept there.",
    )


def _bias(manifest: Manifest, recipe: Mapping[str, Any]) -> Step | None:
    if not recipe.get("bias_correction"):
        return None
    text = "The mean output error that quantization leaves on sample tokens is added to the bias; it costs nothing at run time."
    return Step("bias", "Bias correction", text)


def _activations(manifest: Manifest, recipe: Mapping[str, Any]) -> Step:
    activations = recipe.get("activations", {})
    rule = f"rule {activations['scale_rule']}" if activations.get("scale_rule") else "the format's default rule"
    ties = f", ties {activations['ties']}" if activations.get("ties") else ""
    return Step(
        "activations",
        "Inputs at run time",
        f"Every token's input is quantized when it arrives, each group with its own scale ({rule}{ties}). Nothing is calibrated or kept in higher precision.",
    )


def _protection(manifest: Manifest, recipe: Mapping[str, Any]) -> Step:
    if not manifest.high_precision:
        return Step("", "High-precision blocks", "Every block of every expert runs in W4A4; none is protected.")
    reasons = {f"{row.expert}:{row.block}": row.reason for row in manifest.blocks if row.high_precision}
    listed = "; ".join(f"{name} ({reasons.get(name) or 'no reason recorded'})" for name in manifest.high_precision)
    return Step("", "High-precision blocks", f"Kept as in the original: {listed}.")


def _other(manifest: Manifest, recipe: Mapping[str, Any]) -> Step | None:
    """Keys that are set to something else than their default, and that the steps above do not know."""
    defaults = flatten(Recipe().model_dump(mode="json"))
    off = {"no", "default", "none", "0"}
    values = flatten(dict(recipe))
    unknown = {k: v for k, v in values.items() if k not in _DESCRIBED and v != defaults.get(k) and v not in off}
    if not unknown:
        return None
    listed = ", ".join(f"{key} = {value}" for key, value in sorted(unknown.items()))
    return Step("", "Further settings", f"Set in the recipe and not described above: {listed}.")
