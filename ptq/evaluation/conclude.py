"""From scores to an evaluation: compare, judge, warn. Nothing is read or written, so that `ptq verify` computes it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptq.errors import UsageError
from ptq.evaluation import findings, statistics
from ptq.evaluation.scores import Scores, scores_from_units
from ptq.evaluation.suites import DRIFT_NOTE, HITS, PAIRED_MEASURES, RUN_DIMENSIONS, Suite, get_suite
from ptq.evaluation.vbench.totals import judge_mark, published_totals
from ptq.rules import GATE, MIN_RESAMPLES, RESAMPLES, loss_limit
from ptq.store.evaluation import ROLES, Bootstrap, Dimension, Evaluation, RunSide, Summary, Yardstick
from ptq.store.evaluation_units import UnitLine
from ptq.version import __version__


@dataclass(frozen=True)
class Judgement:
    """How to judge: the format's limit, the deciding aggregate (a key of `statistics.AGGREGATES`), the bootstrap."""

    format: str | None = None
    gate: str = GATE
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gate not in statistics.AGGREGATES:
            raise UsageError(f"The gate is {self.gate!r}; choose one of {', '.join(statistics.AGGREGATES)}.")
        if self.resamples < MIN_RESAMPLES:
            raise UsageError(
                f"--bootstrap is {self.resamples}; 95 % intervals need at least {MIN_RESAMPLES} resamples."
            )


def header(suite: Suite, judgement: Judgement) -> dict[str, Any]:
    """The fields that suite and judgement decide."""
    return {
        "schema": 1,
        "ptq_version": __version__,
        "suite": suite.name,
        "format": judgement.format,
        "limit": loss_limit(judgement.format) if suite.gate and judgement.format else None,
        "gate": judgement.gate if suite.gate else None,
        "bootstrap": Bootstrap(
            resamples=judgement.resamples,
            seed=judgement.seed,
            confidence=statistics.CONFIDENCE,
            method="paired percentile; prompts resampled, each with all its units",
        ),
    }


def conclude(
    content: dict[str, Any],
    suite: Suite,
    judgement: Judgement,
    scores: Scores,
    lines: list[UnitLine] | None,
    extra: list[str],
) -> Evaluation:
    """Compare, judge, and say what a reader must know.

    Args:
        content: fields of the evaluation that do not follow from the scores (`header`, runs, units).
        lines: what was measured; None where only VBench results were read.
        extra: warnings that do not follow from the scores.
    """
    warnings = [*extra, *scores.warnings]
    content = dict(content)
    content.update(dimensions={}, aggregates={}, verdict=None, prompts=len(set(scores.clusters.values())))
    gated, informative = _compare(suite, judgement, scores, lines)
    content["informative"] = informative
    if gated is not None:
        limit, deciding = content["limit"], gated.aggregates.get(judgement.gate)
        verdict = None if limit is None else statistics.verdict(deciding, limit)
        content.update(dimensions=gated.dimensions, aggregates=gated.aggregates, prompts=gated.prompts, verdict=verdict)
        warnings += findings.gate_warnings(gated, limit, verdict, judgement.gate)
        warnings += findings.beside_warnings(suite, scores.reference)
        if suite.is_vbench:
            totals = published_totals(suite, scores)
            mark = {"mark": judge_mark(suite, totals)} if get_suite(suite.name).mark else {}
            content["vbench"] = {**scores.details, "totals": totals, **mark}
            warnings += findings.mark_warnings(suite, totals)
    if lines is not None:
        content["paired"] = _summarize_paired(lines)
        content["duplicates"] = {role: findings.duplicates(lines, role) for role in ROLES}
        content["notes"] = [DRIFT_NOTE]
        warnings += findings.integrity_warnings(lines) + findings.blur_warnings(gated, informative)
    return Evaluation(**content, warnings=warnings)


def measure_yardstick(
    run: RunSide, suite: Suite, judgement: Judgement, scores: Scores, lines: list[UnitLine], extra: list[str]
) -> Yardstick:
    """What another run comes to against the same reference: no limit, no verdict. Arguments as `conclude`."""
    gated, informative = _compare(suite, judgement, scores, lines)
    return Yardstick(
        run=run,
        units=len(lines),
        dimensions=gated.dimensions if gated else {},
        aggregates=gated.aggregates if gated else {},
        informative=informative,
        paired=_summarize_paired(lines),
        warnings=[*extra, *scores.warnings, *findings.integrity_warnings(lines, {"candidate": "yardstick"})],
    )


def _compare(
    suite: Suite, judgement: Judgement, scores: Scores, lines: list[UnitLine] | None
) -> tuple[statistics.Comparison | None, dict[str, Dimension]]:
    """The comparison over the gate's dimensions (None: no gate, or no format), and the dimensions beside it."""
    gated, beside = None, {}
    options = {"resamples": judgement.resamples, "seed": judgement.seed}
    if suite.gate and judgement.format:
        gated = scores.compare([name for name in suite.gate if name in scores.reference], **options)
        further = [name for name in suite.beside if name in scores.reference]
        beside = scores.compare(further, **options).dimensions if further else {}
    if lines is not None:
        own = scores_from_units(lines, [*RUN_DIMENSIONS, *(HITS if suite.name == "tiny" else ())])
        beside |= own.compare(own.reference, **options).dimensions
    return gated, beside


def _summarize_paired(lines: list[UnitLine]) -> dict[str, Summary]:
    """Mean, extremes and count of each paired measure over the units that have it."""
    summary = {}
    for name in PAIRED_MEASURES:
        values = [value for line in lines if (value := line.paired.get(name)) is not None]
        if values:
            mean = float(np.mean(values))
            summary[name] = Summary(mean=mean, min=min(values), max=max(values), units=len(values))
    return summary
