"""Scores of both runs by dimension and unit: the one shape that adherence, VBench runs and VBench imports end in.

Here incomplete sets are refused and missing values handled, so that `statistics.py` gets clean arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptq.errors import PtqError
from ptq.evaluation import statistics
from ptq.store.evaluation_units import UnitLine

_SHOWN = 3


@dataclass
class Scores:
    """`reference` and `candidate`: dimension -> unit -> score. `clusters`: unit -> prompt. `warnings` say what was
    left out.

    `details` holds whatever the origin wants in evaluation.json (versions, files, digests).
    """

    reference: dict[str, dict[str, float]]
    candidate: dict[str, dict[str, float]]
    clusters: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def compare(self, dimensions: Iterable[str], *, resamples: int, seed: int) -> statistics.Comparison:
        """Paired statistics of these dimensions."""
        names = list(dimensions)
        units = {name: sorted(self.reference[name]) for name in names}
        return statistics.compare(
            {name: np.array([self.reference[name][unit] for unit in units[name]]) for name in names},
            {name: np.array([self.candidate[name][unit] for unit in units[name]]) for name in names},
            {name: [self.clusters[unit] for unit in units[name]] for name in names},
            resamples=resamples,
            seed=seed,
        )


def scores_from_units(lines: Iterable[UnitLine], dimensions: Iterable[str]) -> Scores:
    """Scores of built-in dimensions from lines of units.jsonl.

    A dimension that is undefined for some unit (temporal measures of one-frame clips) is left out as a whole, with a
    warning: averaging different units for different dimensions would hide it.
    """
    lines = list(lines)
    scores = Scores({}, {}, {line.unit: line.unit.rsplit("/", 1)[0] for line in lines})
    for name in dimensions:
        ours = {line.unit: value for line in lines if (value := line.reference.get(name)) is not None}
        theirs = {line.unit: value for line in lines if (value := line.candidate.get(name)) is not None}
        absent = [line.unit for line in lines if line.unit not in ours or line.unit not in theirs]
        if absent:
            scores.warnings.append(
                f"{name} is undefined for {len(absent)} of {len(lines)} units ({', '.join(absent[:_SHOWN])}) and is left out."
            )
            continue
        scores.reference[name], scores.candidate[name] = ours, theirs
    return scores


def check_paired(scores: Scores, *, allow_missing: bool, expected: Mapping[str, set[str]] | None = None) -> Scores:
    """Refuse scores that are not finite, or sets of units that differ between the runs or from `expected`.

    With `allow_missing` each dimension keeps the units that both runs have (and that are expected), with a warning.

    Raises:
        PtqError: what is missing, where.
    """
    kept = Scores({}, {}, scores.clusters, list(scores.warnings), scores.details)
    for name in scores.reference:
        ours, theirs = scores.reference[name], scores.candidate.get(name, {})
        for role, rows in (("reference", ours), ("candidate", theirs)):
            broken = [unit for unit, value in rows.items() if not math.isfinite(value)]
            if broken:
                raise PtqError(
                    f"{name} of the {role} is not a number for {len(broken)} videos ({', '.join(broken[:_SHOWN])}). Score those videos again; an average over the rest would not be comparable."
                )
        wanted = set(ours) | set(theirs) if expected is None else expected[name]
        common = set(ours) & set(theirs) & wanted
        lacking = sorted(wanted - common)
        if lacking and not allow_missing:
            raise PtqError(
                f"{name} is incomplete: {len(lacking)} of {len(wanted)} videos have no score in one of the runs ({', '.join(lacking[:_SHOWN])}). VBench drops unreadable videos silently. Score both runs on the same videos, or pass --allow-missing to use the common ones."
            )
        if not common:
            raise PtqError(f"The two runs have no scored video in common for {name}.")
        if lacking:
            kept.warnings.append(
                f"{name}: {len(lacking)} of {len(wanted)} videos left out, scored in only one run or none."
            )
        kept.reference[name] = {unit: ours[unit] for unit in common}
        kept.candidate[name] = {unit: theirs[unit] for unit in common}
    return kept
