"""`ptq compare`: two checkpoints, or two evaluations, side by side. Equal rows are left out of the settings' table.

Reads artifacts as the reports do; a checkpoint that an evaluation cannot find leaves its rows out and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from ptq.errors import UsageError
from ptq.evaluation.statistics import AGGREGATES
from ptq.evaluation.suites import PAIRED_MEASURES
from ptq.report.cells import Cell, Table, count, error, flatten, number, percent, share
from ptq.report.facts import gather
from ptq.report.locate import Sources
from ptq.report.model_tables import layers_by_kind, mean, size_rows
from ptq.store.evaluation import FILE as EVALUATION_FILE
from ptq.store.evaluation import Dimension, Evaluation

ABSENT = "not there"


@dataclass(frozen=True)
class Side:
    """One of the two: a checkpoint, or an evaluation with the checkpoint it judged (None where not found)."""

    path: Path
    manifest: Manifest | None
    evaluation: Evaluation | None


def read_side(path: Path) -> Side:
    """Read a checkpoint or evaluation directory.

    Raises:
        UsageError: neither. Otherwise as `gather` and `read_manifest`.
    """
    if (path / EVALUATION_FILE).is_file():
        facts = gather(Sources(path))
        return Side(path, facts.manifest, facts.evaluation)
    if (path / MANIFEST_FILE).is_file():
        return Side(path, read_manifest(path), None)
    raise UsageError(
        f"{path} is neither a packed checkpoint (no {MANIFEST_FILE}) nor an evaluation directory (no {EVALUATION_FILE}). Pass two of one kind."
    )


def compare_sides(a: Side, b: Side) -> list[Table]:
    """Tables with one column for each side; without content they are left out.

    Raises:
        UsageError: a checkpoint and an evaluation.
    """
    if (a.evaluation is None) != (b.evaluation is None):
        raise UsageError(
            f"{a.path} and {b.path} are of different kinds (a checkpoint and an evaluation). Pass two checkpoints or two evaluation directories."
        )
    tables: list[Table] = []
    if a.evaluation is not None and b.evaluation is not None:
        tables += _evaluations(a.evaluation, b.evaluation)
    tables.append(_settings(a, b))
    if a.manifest is not None and b.manifest is not None:
        sizes = _union(size_rows(a.manifest), size_rows(b.manifest), lambda cell: cell)
        tables += [Table.of("sizes", "Size and coverage", ("", "A", "B"), sizes), _errors(a.manifest, b.manifest)]
    return [table for table in tables if table.rows]


def _evaluations(a: Evaluation, b: Evaluation) -> Iterable[Table]:
    rows: list[tuple[Cell | str, ...]] = [
        ("verdict", a.verdict or "none", b.verdict or "none"),
        ("limit", *(share(e.limit) if e.limit is not None else "none" for e in (a, b))),
        ("videos of each model", count(a.units), count(b.units)),
        ("prompts", count(a.prompts), count(b.prompts)),
    ]
    rows += _union(a.aggregates, b.aggregates, percent, lambda key: AGGREGATES.get(key, key))
    yield Table.of(
        "gate", "Verdict", ("", "A", "B"), rows, "Losses with 95 % intervals; positive: worse than the original."
    )

    def loss(dimension: Dimension) -> Cell:
        return percent(dimension.relative_loss)

    yield Table.of("dimensions", "Loss by dimension", ("dimension", "A", "B"), _union(a.dimensions, b.dimensions, loss))
    drift = _union(a.paired, b.paired, lambda value: number(value.mean), lambda key: PAIRED_MEASURES.get(key, key))
    yield Table.of(
        "drift", "Mean drift from the original", ("measure", "A", "B"), drift, "Drift is no measure of quality."
    )


def _union(
    a: Mapping[str, Any], b: Mapping[str, Any], cell: Callable[[Any], Cell], name: Callable[[str], str] = str
) -> list[tuple[Cell | str, ...]]:
    """One row for each key of either side, in order."""
    keys = dict.fromkeys([*a, *b])
    return [(name(k), *(cell(side[k]) if k in side else Cell(ABSENT) for side in (a, b))) for k in keys]


def _settings(a: Side, b: Side) -> Table:
    ours, theirs = _described(a), _described(b)
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
    rows = [(key, ours.get(key, ABSENT), theirs.get(key, ABSENT)) for key in keys]
    equal = len(set(ours) & set(theirs)) - sum(key in ours and key in theirs for key in keys)
    return Table.of("settings", "Settings that differ", ("", "A", "B"), rows, f"{equal} further settings are equal.")


def _described(side: Side) -> dict[str, str]:
    """Everything that was chosen, as flat texts."""
    values: dict[str, Any] = {}
    if side.evaluation is not None:
        evaluation = side.evaluation
        values["evaluation"] = {"suite": evaluation.suite, "gate": evaluation.gate, "stride": evaluation.stride}
        values["generation"] = evaluation.candidate.settings or {}
        values["reference weights"] = evaluation.reference.checkpoint_digest
        values["run versions"] = evaluation.candidate.versions or {}
    if side.manifest is not None:
        manifest = side.manifest
        values |= {
            "format": manifest.format,
            "variant": manifest.variant,
            "model files": manifest.base_model.get("configs", {}),
            "recipe": manifest.recipe.model_dump(mode="json", exclude={"description", "format"}),
            "recipe name": manifest.recipe_name,
            "calibration": (manifest.calibration or {}).get("digest"),
            "calibration records": (manifest.calibration or {}).get("records"),
            "high-precision blocks": manifest.high_precision,
            "budget scope": manifest.budget_scope,
            "versions": manifest.versions,
        }
    return flatten(values)


def _errors(a: Manifest, b: Manifest) -> Table:
    note = "Relative squared errors on each checkpoint's own calibration records; lower is better."
    return Table.of("errors", "Errors", ("", "A", "B"), _union(_mean_errors(a), _mean_errors(b), error), note)


def _mean_errors(manifest: Manifest) -> dict[str, float]:
    """Denoiser error of each expert, hidden-state error after its last block, mean output error of each kind of layer."""
    errors = {f"denoiser output, {row.expert}": row.denoiser_error for row in manifest.experts}
    errors |= {f"after the last block, {row.expert}": row.stream_error for row in manifest.blocks}
    kinds = layers_by_kind(manifest).items()
    return errors | {f"mean of {name}": mean([row.output_error for row in rows]) for name, rows in kinds}
