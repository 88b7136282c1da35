"""The evaluation's tables: gate, averages, VBench totals, measures beside the gate, drift, single videos."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ptq.evaluation.statistics import AGGREGATES
from ptq.evaluation.suites import DRIFT_NOTE, PAIRED_MEASURES, RUN_DIMENSIONS
from ptq.report.cells import Cell, Table, count, number, percent, signed
from ptq.report.facts import Facts
from ptq.store.evaluation import Estimate, Evaluation, Yardstick
from ptq.ui import shorten

SHOWN_UNITS = 12
_PROMPT_CHARS = 90


def evaluation_tables(evaluation: Evaluation) -> Iterable[Table]:
    """Tables of evaluation.json, in reading order; those without content are left out."""
    if evaluation.dimensions:
        yield _gate(evaluation)
        yield _averages(evaluation)
    if evaluation.yardstick is not None:
        yield _yardstick(evaluation, evaluation.yardstick)
    totals = (evaluation.vbench or {}).get("totals")
    if totals:
        yield _totals(totals, (evaluation.vbench or {}).get("mark"))
    if evaluation.informative:
        yield _measures(evaluation)
    if evaluation.paired:
        yield _drift(evaluation)


def _gate(evaluation: Evaluation) -> Table:
    rows = [
        (
            name.replace("_", " "),
            percent(value.relative_loss),
            number(value.reference),
            number(value.candidate),
            _points(value.points),
            count(value.units),
        )
        for name, value in evaluation.dimensions.items()
    ]
    columns = ("dimension", "loss, 95 % interval", "original", "quantized", "points", "videos")
    note = "Positive: the quantized model is worse. Points are 100 x the difference of the scores."
    return Table.of("gate", "Loss by dimension", columns, rows, note)


def _points(estimate: Estimate) -> Cell:
    """A difference of scores; the interval, which says what that of the loss says, is among the values only."""
    values = (estimate.value, estimate.low, estimate.high)
    return Cell(signed(estimate.value, 2), tuple(value for value in values if value is not None))


def _averages(evaluation: Evaluation) -> Table:
    rows = [
        (f"{AGGREGATES[key]}{' (decides)' if key == evaluation.gate else ''}", percent(value))
        for key, value in evaluation.aggregates.items()
    ]
    limit = "" if evaluation.limit is None else f"Limit: {100 * evaluation.limit:g} %. "
    note = f"{limit}All four are shown, so that a pass by cancellation is visible."
    return Table.of("averages", "Averages over the dimensions", ("average", "loss, 95 % interval"), rows, note)


def yardstick_name(yardstick: Yardstick) -> str:
    """What the yardstick is called: its model as it was named, else the directory of its run."""
    return shorten(yardstick.run.model or str(yardstick.run.directory), 60)


def _yardstick(evaluation: Evaluation, yardstick: Yardstick) -> Table:
    """Losses of both models against the same original, and their drift."""
    rows = [
        (name.replace("_", " "), percent(value.relative_loss), percent(yardstick.dimensions[name].relative_loss))
        for name, value in evaluation.dimensions.items()
        if name in yardstick.dimensions
    ]
    rows += [
        (AGGREGATES[key], percent(value), percent(yardstick.aggregates[key]))
        for key, value in evaluation.aggregates.items()
        if key in yardstick.aggregates
    ]
    rows += [
        (PAIRED_MEASURES[key], number(evaluation.paired[key].mean), number(yardstick.paired[key].mean))
        for key in ("psnr", "ssim")
        if key in evaluation.paired and key in yardstick.paired
    ]
    title = f"Beside a yardstick: {yardstick_name(yardstick)}"
    note = f"Both against the same original, the yardstick on {yardstick.units} videos; it has no part in the verdict."
    return Table.of("yardstick", title, ("loss, 95 % interval, or mean", "quantized", "yardstick"), rows, note)


def _totals(totals: dict[str, Any], mark: dict[str, Any] | None) -> Table:
    rows = [(name, number(value), number(totals["candidate"][name])) for name, value in totals["reference"].items()]
    note = ""
    if mark:
        what = f"{mark['needed']:g}, {mark['share']:.0%} of the published {mark['published']:g}"
        note = f"The quantized model {'reaches' if mark['reached'] else 'does not reach'} the suite's mark ({what}). The verdict is of the paired loss."
    return Table.of("totals", "VBench totals", ("score", "original", "quantized"), rows, note)


def _measures(evaluation: Evaluation) -> Table:
    rows = [
        (
            RUN_DIMENSIONS.get(name, name.replace("_", " ")),
            percent(value.relative_loss, sign=-1),
            number(value.reference),
            number(value.candidate),
        )
        for name, value in evaluation.informative.items()
    ]
    columns = ("measure", "change, 95 % interval", "original", "quantized")
    return Table.of(
        "measures", "Beside the gate: both runs", columns, rows, "Shown for context; no part of the verdict."
    )


def _drift(evaluation: Evaluation) -> Table:
    rows = [
        (PAIRED_MEASURES.get(name, name), number(v.mean), number(v.min), number(v.max), count(v.units))
        for name, v in evaluation.paired.items()
    ]
    sources = ", ".join(f"{n} from {source}" for source, n in sorted(evaluation.sources.items()))
    note = DRIFT_NOTE + (f" Frames: {sources}." if sources else "")
    return Table.of(
        "drift", "Drift between the paired videos", ("measure", "mean", "lowest", "highest", "videos"), rows, note
    )


def worst_units(facts: Facts) -> Table:
    """Videos with the largest mean drop of the gate's scores: where to look first."""
    names = list(facts.evaluation.dimensions)
    drops = []
    for line in facts.units:
        both = [(line.reference.get(n), line.candidate.get(n)) for n in names]
        scored = [(r, c) for r, c in both if r is not None and c is not None]
        if scored:
            drops.append((sum(r - c for r, c in scored) / len(scored), line.unit))
    prompts = {reference.name: str(reference.line.prompt) for reference, _ in facts.pairs}
    worst = sorted(drops, key=lambda item: (-item[0], item[1]))[:SHOWN_UNITS]
    rows = [
        (unit, shorten(prompts.get(unit, ""), _PROMPT_CHARS), Cell(signed(drop, 4), (drop,))) for drop, unit in worst
    ]
    title = f"The {len(rows)} videos with the largest loss"
    unit = (
        "their own units"
        if any(d.reference > 1 for d in facts.evaluation.dimensions.values())
        else "scores from 0 to 1"
    )
    note = f"Mean difference original minus quantized over the gate's dimensions of one video, in {unit}."
    return Table.of("units", title, ("video", "prompt", "drop"), rows, note)
