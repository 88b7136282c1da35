"""Read VBench result files and pair their rows.

Shape of `*_eval_results.json`: {dimension: [score, rows]}, camera_motion has [score, scores by type, rows]; a row has
`video_path` and `video_results`, which may be a bool, and is 0-100 for imaging_quality while its score is 0-1. Scores come
from the rows here: VBench's own hides dropped videos, and weights some dimensions by frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.errors import DamagedFileError, PtqError, shown
from ptq.evaluation.runs import Unit
from ptq.evaluation.scores import Scores, check_paired
from ptq.evaluation.suites import Suite
from ptq.store.files import read_json, sha256_file

ROW_SCALE = {"imaging_quality": 0.01}
"""Rows of these dimensions are on another scale than the score."""

PARTIAL = frozenset({"color"})
"""Dimensions for which VBench leaves videos out by design: color skips those where it detects no object."""

SCORE_GAP = 1e-3
"""Gap between VBench's score and the mean of its rows that is worth a warning."""

_TOLERANCE = 1e-3
_SHOWN = 3


@dataclass(frozen=True)
class DimensionRows:
    """One dimension of one file: `rows` maps a video's file name to its score on the 0-1 scale; `score` is VBench's."""

    score: float
    rows: dict[str, float]


def parse_results(value: Any, origin: str) -> dict[str, DimensionRows]:
    """Check and normalize the content of a result file; `origin` is how messages call it.

    Raises:
        DamagedFileError: another shape, a video scored twice, or a value that is not a finite number.
    """
    if not isinstance(value, dict) or not value:
        raise DamagedFileError(f"{origin} is not a VBench result file: expected an object of dimensions.")
    return {name: _parse_dimension(name, entry, origin) for name, entry in value.items()}


def _parse_dimension(name: str, entry: Any, origin: str) -> DimensionRows:
    where = f"{origin}, dimension {ui.shorten(name)}"
    if not isinstance(entry, list) or len(entry) not in (2, 3) or not isinstance(entry[-1], list):
        raise DamagedFileError(f"{where}: expected [score, rows], or [score, groups, rows] for camera_motion.")
    if not entry[-1]:
        raise DamagedFileError(f"{where} has no rows: VBench scored no video.")
    rows: dict[str, float] = {}
    for number, row in enumerate(entry[-1], 1):
        if not isinstance(row, dict) or not isinstance(row.get("video_path"), str) or "video_results" not in row:
            raise DamagedFileError(f"{where}, row {number}: expected video_path and video_results.")
        video = Path(row["video_path"]).name
        if video in rows:
            raise DamagedFileError(f"{where}: {ui.shorten(video)} is scored twice. Score each video once.")
        rows[video] = _number(row["video_results"], f"{where}, {ui.shorten(video)}", ROW_SCALE.get(name, 1.0))
    return DimensionRows(_number(entry[0], f"{where}, score"), rows)


def _number(value: Any, where: str, scale: float = 1.0) -> float:
    """A float from a number or bool, brought to the scale of scores: from 0 to 1, cosines from -1."""
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise DamagedFileError(f"{where}: {shown(value)} is not a finite number. Score the video again.")
    if abs(value * scale) > 1 + _TOLERANCE:
        raise DamagedFileError(f"{where}: {value} is not on the scale of VBench's scores. Score the video again.")
    return float(value) * scale


def imported_scores(
    reference: Path,
    candidate: Path,
    suite: Suite,
    *,
    pairs: Sequence[tuple[Unit, Unit]] | None,
    allow_missing: bool,
) -> Scores:
    """Scores of two result files over the suite's dimensions; of those beside the verdict only what both files have.

    Args:
        pairs: the runs' units; rows are matched to them by file name (that of the run, or VBench's `<prompt>-<k>.mp4`) and
            must be complete. None: rows are matched to each other by file name.

    Raises:
        PtqError: dimensions or rows are missing, or rows belong to no unit. DamagedFileError: see `parse_results`.
    """
    tables = [parse_results(read_json(path, nan=True), str(path)) for path in (reference, candidate)]
    for path, table in zip((reference, candidate), tables, strict=True):
        missing = [name for name in suite.gate if name not in table]
        if missing:
            raise PtqError(
                f"{path} lacks {', '.join(missing)}; it has {ui.shorten(', '.join(table), 300)}. Run those dimensions, or choose with --dimensions what both files have."
            )
    suite = replace(suite, beside=tuple(name for name in suite.beside if all(name in table for table in tables)))
    details = {"files": [{"path": str(path), "sha256": sha256_file(path)} for path in (reference, candidate)]}
    return scores_from_tables(tables[0], tables[1], suite, pairs, allow_missing=allow_missing, details=details)


def scores_from_tables(
    reference: dict[str, DimensionRows],
    candidate: dict[str, DimensionRows],
    suite: Suite,
    pairs: Sequence[tuple[Unit, Unit]] | None,
    *,
    allow_missing: bool,
    details: dict[str, Any],
    expected: dict[str, set[str]] | None = None,
) -> Scores:
    """Pair two sets of parsed dimensions; `expected` overrides which units each dimension must cover."""
    clusters = {ours.name: ours.cluster for ours, _ in pairs} if pairs is not None else {}
    scores = Scores({}, {}, clusters, details=details)
    for role, table, side in ((0, reference, scores.reference), (1, candidate, scores.candidate)):
        names = _unit_names([pair[role] for pair in pairs]) if pairs is not None else None
        for name in suite.scored:
            side[name] = _by_unit(table[name].rows, names, name)
    if pairs is None:
        for table_rows in (*scores.reference.values(), *scores.candidate.values()):
            clusters.update({video: _prompt_of(video) for video in table_rows})
    elif expected is None and suite.mode == "custom_input":
        expected = {name: set(clusters) for name in suite.scored}
    details["reported"] = {
        name: {"reference": reference[name].score, "candidate": candidate[name].score} for name in suite.scored
    }
    scores.warnings += _score_gaps(suite, reference, candidate) + _drop_partial(scores, expected)
    return check_paired(scores, allow_missing=allow_missing, expected=expected)


def _unit_names(units: Sequence[Unit]) -> dict[str, str]:
    names: dict[str, str] = {}
    for unit in units:
        for file in (unit.video.name, standard_name(unit)):
            if names.setdefault(file, unit.name) != unit.name:
                raise PtqError(f"Two units share the video name {file}; rows cannot be matched to them.")
    return names


def standard_name(unit: Unit) -> str:
    """The file name VBench's standard mode expects: `<prompt>-<k>.mp4`."""
    return f"{unit.score_prompt}-{unit.line.k}.mp4"


def _by_unit(rows: dict[str, float], names: dict[str, str] | None, dimension: str) -> dict[str, float]:
    if names is None:
        return dict(rows)
    strange = [video for video in rows if video not in names]
    if strange:
        raise PtqError(
            f"{dimension} has scores for {len(strange)} videos that are not in the run ({', '.join(strange[:_SHOWN])}). Import the results of this run's own videos folder."
        )
    return {names[video]: value for video, value in rows.items()}


def _prompt_of(video: str) -> str:
    """The prompt part of `<prompt>-<k>.mp4`; the whole stem when there is no number."""
    stem = Path(video).stem
    head, dash, tail = stem.rpartition("-")
    return head if dash and tail.isdigit() else stem


def _drop_partial(scores: Scores, expected: dict[str, set[str]] | None) -> list[str]:
    """Reduce dimensions that VBench leaves incomplete by design to the common units, and say how many each run lost."""
    found = []
    for name in PARTIAL & set(scores.reference):
        ours, theirs = scores.reference[name], scores.candidate[name]
        common = set(ours) & set(theirs)
        if expected is not None:
            expected[name] = common
        if len(common) < max(len(ours), len(theirs)):
            found.append(
                f"{name}: VBench scores only videos in which it detects the object: {len(ours)} of the reference, {len(theirs)} of the candidate, {len(common)} in both. A candidate that draws fewer objects is not punished here."
            )
        scores.reference[name] = {unit: ours[unit] for unit in common}
        scores.candidate[name] = {unit: theirs[unit] for unit in common}
    return found


def _score_gaps(suite: Suite, *tables: dict[str, DimensionRows]) -> list[str]:
    found = []
    for role, table in zip(("reference", "candidate"), tables, strict=True):
        for name in suite.scored:
            mean = sum(table[name].rows.values()) / len(table[name].rows)
            if abs(mean - table[name].score) > SCORE_GAP:
                found.append(
                    f"{name} of the {role}: VBench reports {table[name].score:.4f}, its rows average {mean:.4f}. The rows are used (VBench weights some dimensions by frames)."
                )
    return found
