"""Paired statistics of two result sets: relative losses, bootstrap intervals, aggregates, the verdict.

Pure functions on arrays; no files, no names of suites. Everything derives from the mean of each dimension over
units, for the reference (B) and the candidate (Q): relative loss (B - Q) / B, positive when the candidate is worse.

Intervals: paired percentile bootstrap (Efron and Tibshirani 1993, ch. 13). A resample draws prompts with replacement,
each with all its units and both its runs, so that pairing, several samples of one prompt, and the correlation between
dimensions are all kept. The percentile method was preferred to BCa because it stays defined when all pairs are equal
and because its arithmetic is one matrix product; below about 20 prompts both are too narrow, which the caller must say.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptq.store.evaluation import FAIL, INCONCLUSIVE, PASS, Dimension, Estimate, Verdict

CONFIDENCE = 0.95
"""Of the intervals."""
AGGREGATES: Mapping[str, str] = {
    "mean_signed": "mean signed relative loss",
    "mean_absolute": "mean absolute relative loss",
    "mean_positive": "mean of the positive parts",
    "mean_score": "loss of the mean score",
}
"""Name of an average over the dimensions, any of which may be the gate -> its words."""
_CHUNK = 4096


@dataclass(frozen=True)
class Comparison:
    """All statistics of one comparison. `aggregates` is keyed like `AGGREGATES`; `undefined` names dimensions
    without one.
    """

    dimensions: dict[str, Dimension]
    aggregates: dict[str, Estimate]
    undefined: list[str]
    prompts: int


def compare(
    reference: Mapping[str, np.ndarray],
    candidate: Mapping[str, np.ndarray],
    clusters: Mapping[str, Sequence[Hashable]],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two runs over paired units.

    Args:
        reference, candidate: dimension -> scores [U_d], float64, finite; entry u of both is one pair.
        clusters: dimension -> the prompt of each unit [U_d]. Dimensions may cover different units (VBench scores each
            on its own prompts); a prompt drawn in a resample counts in every dimension that has it.
        resamples: bootstrap resamples; the seed fixes them.

    Raises:
        ValueError: no dimension, an empty one, lengths that differ, or values that are not finite.
    """
    names = list(reference)
    _check(names, reference, candidate, clusters)
    prompts = {prompt: row for row, prompt in enumerate(sorted({p for name in names for p in clusters[name]}, key=str))}
    size = len(prompts)
    sums, counts = np.zeros((2, size, len(names))), np.zeros((size, len(names)))
    for column, name in enumerate(names):
        rows = np.array([prompts[prompt] for prompt in clusters[name]])
        np.add.at(sums[0, :, column], rows, np.asarray(reference[name], np.float64))
        np.add.at(sums[1, :, column], rows, np.asarray(candidate[name], np.float64))
        np.add.at(counts[:, column], rows, 1.0)
    means = sums.sum(1) / counts.sum(0)
    drawn = _resampled_means(sums, counts, resamples, seed) if size > 1 else None
    return _summarize(names, means, drawn, counts.sum(0), size)


def _check(names: list[str], reference: Any, candidate: Any, clusters: Any) -> None:
    if not names or set(names) != set(candidate) or set(names) != set(clusters):
        raise ValueError("reference, candidate and clusters need the same dimensions, at least one")
    for name in names:
        ours, theirs = np.asarray(reference[name], float), np.asarray(candidate[name], float)
        if ours.ndim != 1 or not ours.size or ours.shape != theirs.shape or len(clusters[name]) != ours.size:
            raise ValueError(f"dimension {name}: {ours.shape} and {theirs.shape} scores, {len(clusters[name])} prompts")
        if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
            raise ValueError(f"dimension {name} has values that are not finite")


def _resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means [2, resamples, D] of both runs over resampled prompts; NaN where a resample misses a dimension
    altogether.
    """
    rng = np.random.default_rng(seed)
    size = counts.shape[0]
    parts = []
    for start in range(0, resamples, _CHUNK):
        times = rng.multinomial(size, np.full(size, 1.0 / size), min(_CHUNK, resamples - start)).astype(np.float64)
        with np.errstate(invalid="ignore"):
            parts.append((times @ sums) / (times @ counts))
    return np.concatenate(parts, axis=1)


def relative_loss(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """(B - Q) / B elementwise; NaN where B is not positive (a relative loss has no meaning there)."""
    safe = np.where(reference > 0, reference, 1.0)
    return np.where(reference > 0, (reference - candidate) / safe, np.nan)


def aggregate(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """The four aggregates over the last axis (dimensions) of mean scores [..., D]."""
    losses = relative_loss(reference, candidate)
    return {
        "mean_signed": losses.mean(-1),
        "mean_absolute": np.abs(losses).mean(-1),
        "mean_positive": np.maximum(losses, 0.0).mean(-1),
        "mean_score": relative_loss(reference.mean(-1), candidate.mean(-1)),
    }


def _estimate(value: float | np.ndarray, drawn: np.ndarray | None) -> Estimate:
    """The 95 % percentile interval of resampled values; none when any resample leaves the value undefined."""
    if drawn is None or np.isnan(drawn).any():
        return Estimate(value=float(value), low=None, high=None)
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return Estimate(value=float(value), low=float(low), high=float(high))


def _summarize(
    names: list[str],
    means: np.ndarray,
    drawn: np.ndarray | None,
    units: np.ndarray,
    prompts: int,
) -> Comparison:
    losses = relative_loss(means[0], means[1])
    drawn_losses = None if drawn is None else relative_loss(drawn[0], drawn[1])
    dimensions = {}
    for d, name in enumerate(names):
        loss = None
        if not np.isnan(losses[d]):
            loss = _estimate(losses[d], None if drawn_losses is None else drawn_losses[:, d])
        points = _estimate(
            100.0 * (means[0, d] - means[1, d]), None if drawn is None else 100.0 * (drawn[0, :, d] - drawn[1, :, d])
        )
        dimensions[name] = Dimension(
            reference=float(means[0, d]),
            candidate=float(means[1, d]),
            relative_loss=loss,
            points=points,
            units=int(units[d]),
        )
    defined = [d for d in range(len(names)) if not np.isnan(losses[d])]
    aggregates: dict[str, Estimate] = {}
    if defined:
        values = aggregate(means[0, defined], means[1, defined])
        spread = None if drawn is None else aggregate(drawn[0][:, defined], drawn[1][:, defined])
        aggregates = {key: _estimate(values[key], None if spread is None else spread[key]) for key in AGGREGATES}
    undefined = [name for d, name in enumerate(names) if d not in defined]
    return Comparison(dimensions, aggregates, undefined, prompts)


def verdict(estimate: Estimate | None, limit: float) -> Verdict:
    """PASS when the whole interval is below the limit, FAIL when all of it is at or above, else INCONCLUSIVE."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return INCONCLUSIVE
    if estimate.high < limit:
        return PASS
    return FAIL if estimate.low >= limit else INCONCLUSIVE


def cancels(comparison: Comparison, limit: float) -> list[str]:
    """Dimensions whose loss is over the limit while gains elsewhere pull the signed mean under it.

    Empty unless the mean signed loss is below the limit and the mean of the positive parts is not.
    """
    signed, positive = comparison.aggregates.get("mean_signed"), comparison.aggregates.get("mean_positive")
    if signed is None or positive is None or signed.value >= limit or positive.value < limit:
        return []
    over = [(d.relative_loss.value, name) for name, d in comparison.dimensions.items() if d.relative_loss]
    return [name for loss, name in sorted(over, reverse=True) if loss >= limit]
