"""The method as this checkpoint's recipe really ran: an ingredient is described only when it was on.

The parts describe themselves (format, transform, and each group of the recipe's settings); figures come from the per-layer
statistics in the manifest; `key` selects the equation in the PDF's template. Keys of an earlier version that no step here
describes are named, never dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ptq.checkpoint.manifest import Manifest
from ptq.scheme import Transform, get_format, get_transform
from ptq.store.lora import describe_loras


@dataclass(frozen=True)
class Step:
    """One ingredient: a name, what was done with the figures of this run, and the key of its equation."""

    key: str
    title: str
    text: str


def describe_method(manifest: Manifest) -> list[Step]:
    """The steps in the order in which they act."""
    makers: Iterable[Callable[[Manifest], Step | None]] = (
        _format, _merge, _records, _replay, _transform, _scales, _rounding, _tuning, _inputs, _residual, _protection, _earlier,
    )  # fmt: skip
    return [step for maker in makers if (step := maker(manifest)) is not None]


def _format(manifest: Manifest) -> Step:
    text = f"{get_format(manifest.format).description} Weights and inputs of every quantized layer use it."
    if manifest.recipe.description:
        text += f" The recipe, {manifest.recipe_name}, says of itself: {manifest.recipe.description}"
    return Step(f"format-{manifest.format}", "Number format", text)


def _merge(manifest: Manifest) -> Step | None:
    if not manifest.loras:
        return None
    text = f"Before anything was recorded, a low-rank adapter was added to the original weights, in float32 and rounded to their stored type: {describe_loras(manifest.loras)}. Recording, quantization and the reference run use the merged model."
    return Step("", "Merged LoRA", text)


def _records(manifest: Manifest) -> Step | None:
    calibration = manifest.calibration
    if calibration is None:
        return None
    return Step(
        "records",
        "Recorded inputs",
        f"The original pipeline ran on {len(calibration['samples'])} prompts of {calibration['prompts']['name']}; {calibration['records']} calls of the denoiser were recorded with latents, timestep and text embedding, from steps spread over each expert's range.",
    )


def _replay(manifest: Manifest) -> Step:
    if manifest.recipe.solver.needs_records or _kind(manifest).needs_records:
        return Step("", "Block by block", manifest.recipe.records.describe())
    text = "Blocks are converted one at a time; the recorded calls are replayed to measure the errors in this report. This recipe takes nothing else from them."
    return Step("", "Block by block", text)


def _kind(manifest: Manifest) -> Transform:
    return get_transform(manifest.recipe.scheme.transform, manifest.recipe.scheme.block)


def _transform(manifest: Manifest) -> Step | None:
    transform = _kind(manifest)
    if not transform.description:
        return None
    sizes = sorted({transform.block_of(row.shape[1]) for row in manifest.layers}, reverse=True)
    text = transform.description.format(block=" and ".join(map(str, sizes)))
    if transform.needs_records:
        alphas = ", ".join(f"{alpha:g}" for alpha in manifest.recipe.solver.smoothing)
        chosen = Counter(row.basis for row in manifest.layers)
        counted = ", ".join(f"{name} for {n}" for name, n in sorted(chosen.items()))
        tried = f" Exponents of smoothing tried for each input: {alphas}, and none." if alphas else ""
        text += f"{tried} Kept is the candidate with the smallest output error with both sides quantized. Chosen over all layers: {counted}."
    return Step(transform.kind, transform.title, text)


def _scales(manifest: Manifest) -> Step | None:
    fmt, solver = get_format(manifest.format), manifest.recipe.solver
    if solver.clip_search:
        text = f"The scale of each weight group is the one with the smallest weighted error ({fmt.searched(solver.weight_rule)}). The stored numbers are plain {fmt.title}."
        return Step("scales", "Searched group scales", text)
    return (
        Step("", "Weight scales", f"Weight scales follow the rule {solver.weight_rule}.")
        if solver.weight_rule
        else None
    )


def _rounding(manifest: Manifest) -> Step:
    solver = manifest.recipe.solver
    if solver.rounding == "rtn":
        return Step("rtn", "Rounding to nearest", solver.describe())
    retries = sum(row.damping_retries for row in manifest.layers)
    kept = sum(row.rows_kept_rtn for row in manifest.layers)
    rows = sum(row.shape[0] for row in manifest.layers)
    text = f"{solver.describe()}, raised {retries} times. Plain rounding was the better of the two in {kept} of {rows} output rows and was kept there."
    return Step("gptq", "GPTQ rounding", text)


def _tuning(manifest: Manifest) -> Step | None:
    tune, rows = manifest.recipe.solver.tune, [row.tuning for row in manifest.blocks if row.tuning is not None]
    if tune is None or not rows:
        return None
    kept = [row for row in rows if row.kept]
    least, most = min(row.held_out for row in rows), max(row.held_out for row in rows)
    held_out = f"{least}" if least == most else f"{least} to {most}"
    done = f"None of {len(rows)} blocks kept them, for none had less error on its {held_out} held-out records."
    if kept:
        gain = sum(1 - row.after / row.before for row in kept) / len(kept)
        done = f"{len(kept)} of {len(rows)} blocks kept them, with {gain:.1%} less error on {held_out} held-out records in the mean."
    text = f"{tune.describe()} {done} Errors of single layers in this report are from before."
    return Step("", "Codes tuned block by block", text)


def _inputs(manifest: Manifest) -> Step:
    return Step("activations", "Inputs at run time", manifest.recipe.describe_inputs())


def _residual(manifest: Manifest) -> Step | None:
    text = manifest.recipe.solver.describe_residual()
    if not text or not manifest.coverage.residual_share:
        return None
    blocks = sum(len(row.residual_blocks) for row in manifest.layers)
    layers = sum(bool(row.residual_blocks) for row in manifest.layers)
    added = f"{blocks} blocks of {layers} of the {len(manifest.layers)} layers were chosen, {manifest.coverage.residual_share:.2%} more products in the recorded calls."
    return Step("", "Residual blocks", f"{text} {added}")


def _protection(manifest: Manifest) -> Step:
    if not manifest.high_precision:
        return Step("", "High-precision blocks", "Every block of every expert runs in W4A4; none is protected.")
    reasons = {f"{row.expert}:{row.block}": row.reason for row in manifest.blocks if row.high_precision}
    listed = "; ".join(f"{name} ({reasons.get(name) or 'no reason recorded'})" for name in manifest.high_precision)
    return Step("", "High-precision blocks", f"Kept as in the original: {listed}.")


def _earlier(manifest: Manifest) -> Step | None:
    """Keys of an earlier version that today's recipes do not have."""
    if not manifest.earlier_keys:
        return None
    listed = ", ".join(f"{key} = {value}" for key, value in sorted(manifest.earlier_keys.items()))
    return Step(
        "",
        "Further settings",
        f"Set in the recipe of the earlier version that made this checkpoint, and not described above: {listed}.",
    )
