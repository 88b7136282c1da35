"""VBench's published totals: normalized dimensions, weighted into groups, weighted into one score.

(raw - min) / (max - min) with the constants of VBench's `scripts/constant.py`, dynamic_degree (and, for I2V, camera_motion)
with a lower weight; Total = (4 x Quality + Semantic) / 5, for I2V the mean of both groups. Only defined on the full set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq.evaluation.scores import Scores
from ptq.evaluation.suites import Suite

MEAN = "plain mean, percent"
"""Name of the total of suites with a mark."""
UNCOUNTED = frozenset({"color", "temporal_flickering"})


def published_totals(suite: Suite, scores: Scores) -> dict[str, Any] | None:
    """Totals of both runs, or None where the suite has none or the scores do not cover the full benchmark."""
    if (suite.totals is None and suite.mark is None) or not covers_benchmark(suite, scores):
        return None
    means = {
        role: {name: sum(rows.values()) / len(rows) for name, rows in table.items()}
        for role, table in (("reference", scores.reference), ("candidate", scores.candidate))
    }
    if suite.mark is not None:
        return {role: {MEAN: 100 * sum(values.values()) / len(values)} for role, values in means.items()}
    return {role: total(suite, values) for role, values in means.items()}


def judge_mark(suite: Suite, totals: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The suite's published mark beside the candidate's plain mean: {published, share, needed, score, reached}; None without."""
    if suite.mark is None or totals is None:
        return None
    score, needed = totals["candidate"][MEAN], suite.mark.needed
    return {**vars(suite.mark), "needed": needed, "score": score, "reached": score >= needed}


def covers_benchmark(suite: Suite, scores: Scores) -> bool:
    """True when every dimension has all its prompts with all their videos.

    The videos of color and temporal_flickering cannot be counted: VBench leaves out videos without the object, and
    filters static ones.
    """
    if not suite.prompts:
        return False
    for name, prompts in suite.prompts.items():
        units = scores.reference.get(name, {})
        if name not in UNCOUNTED and len(units) != prompts * suite.videos_per_prompt:
            return False
        if len({scores.clusters[unit] for unit in units}) > prompts or not units:
            return False
    return True


def total(suite: Suite, means: Mapping[str, float]) -> dict[str, float]:
    """Group scores and `total` from the raw mean of every dimension (scores on VBench's own 0-1 scales)."""
    if suite.totals is None or suite.normalization is None:
        raise ValueError(f"suite {suite.name} has no published totals")
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, (low, high, weight, group) in suite.normalization.items():
        groups.setdefault(group, []).append((weight, (means[name] - low) / (high - low)))
    result = {
        group: sum(weight * value for weight, value in parts) / sum(weight for weight, _ in parts)
        for group, parts in groups.items()
    }
    weights = suite.totals
    result["total"] = sum(weights[group] * result[group] for group in weights) / sum(weights.values())
    return result
