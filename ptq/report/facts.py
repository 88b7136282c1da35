"""Everything that a report may say, read once from the artifacts; both outputs and the terminal take it from here.

Nothing is measured again: numbers are those of evaluation.json, units.jsonl and the manifest. `omissions` names each
artifact that was not found and what is therefore missing, so that a gap is always stated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ptq.checkpoint.manifest import Manifest, read_manifest
from ptq.errors import PtqError
from ptq.evaluation.overlap import seen_in_calibration
from ptq.evaluation.runs import Run, Unit, read_run
from ptq.prompts import caption_digest
from ptq.report.locate import Sources, find_calibration, find_checkpoint, find_run
from ptq.store.calibration import CalibrationInfo
from ptq.store.evaluation import ROLES, Evaluation, RunSide, read_evaluation
from ptq.store.evaluation_units import FILE as UNITS_FILE
from ptq.store.evaluation_units import UnitLine, read_units
from ptq.store.files import read_json
from ptq.store.schema import Schema, parse
from ptq.store.sensitivity import SENSITIVITY_FILE, SensitivityTable, read_sensitivity


class Ablation(Schema):
    """A table of recipes that the user measured: --ablation FILE, a JSON object with these keys."""

    title: str
    columns: list[str]
    rows: list[list[str | int | float]]
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """One job's artifacts.

    Attributes:
        evaluation: evaluation.json; units: lines of units.jsonl.
        checkpoint, manifest, sensitivity, calibration: None where not found (or not made).
        runs: role -> generation run, None where not found.
        omissions: what is missing and what the report therefore lacks.
    """

    directory: Path
    evaluation: Evaluation
    units: list[UnitLine]
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    sensitivity: SensitivityTable | None = None
    calibration: CalibrationInfo | None = None
    runs: Mapping[str, Run | None] = field(default_factory=dict)
    ablation: Ablation | None = None
    omissions: tuple[str, ...] = ()

    @property
    def format_name(self) -> str:
        """The format as people write it."""
        from ptq.scheme import FORMATS

        name = self.evaluation.format or (self.manifest.format if self.manifest else None)
        return FORMATS[name].title if name in FORMATS else name or "The candidate"

    @property
    def pairs(self) -> list[tuple[Unit, Unit]]:
        """Evaluated units whose two videos are here, in the order of units.jsonl."""
        reference, candidate = (self.runs.get(role) for role in ROLES)
        if reference is None or candidate is None:
            return []
        both = reference.units.keys() & candidate.units.keys()
        return [(reference.units[line.unit], candidate.units[line.unit]) for line in self.units if line.unit in both]

    @property
    def overlap(self) -> int | None:
        """How many evaluated prompts were calibration prompts too; None where that cannot be known."""
        run = self.runs.get("candidate")
        if run is None or self.manifest is None or self.manifest.calibration is None:
            return None
        evaluated = {line.unit: run.units[line.unit].line for line in self.units if line.unit in run.units}
        seen = seen_in_calibration(self.manifest, evaluated) or ()
        return len({caption_digest(str(evaluated[name].prompt)) for name in seen})


def gather(sources: Sources) -> Facts:
    """Read every artifact of a report.

    Raises:
        PtqError: no evaluation there, or a directory that was named is not what it should be.
        DamagedFileError: an artifact that exists cannot be read.
    """
    evaluation = read_evaluation(sources.evaluation)
    omissions: list[str] = []
    units = read_units(sources.evaluation)
    if not (sources.evaluation / UNITS_FILE).is_file():
        omissions.append(f"{UNITS_FILE} is missing: scores of single videos are not in this report.")
    checkpoint = find_checkpoint(sources, evaluation)
    manifest = sensitivity = calibration = None
    if checkpoint is None:
        omissions.append(
            "The packed checkpoint was not found (pass --checkpoint): layer and block errors, size, coverage, recipe and method are not in this report."
        )
    else:
        manifest = read_manifest(checkpoint)
        if evaluation.candidate.checkpoint_digest is None:
            omissions.append(
                "The evaluation records no checkpoint digest: nothing proves that it judged this checkpoint."
            )
        sensitivity = _read_sensitivity(checkpoint, omissions)
        calibration = _read_calibration(sources.evaluation, checkpoint, manifest, omissions)
    runs = {role: _read_run(sources, getattr(evaluation, role), role, omissions) for role in ROLES}
    ablation = _read_ablation(sources.ablation)
    if ablation is None:
        omissions.append("No ablation table was given (--ablation): this report does not compare recipes.")
    return Facts(
        directory=sources.evaluation,
        evaluation=evaluation,
        units=units,
        checkpoint=checkpoint,
        manifest=manifest,
        sensitivity=sensitivity,
        calibration=calibration,
        runs=runs,
        ablation=ablation,
        omissions=tuple(omissions),
    )


def _read_sensitivity(checkpoint: Path, omissions: list[str]) -> SensitivityTable | None:
    if (checkpoint / SENSITIVITY_FILE).is_file():
        return read_sensitivity(checkpoint)
    omissions.append(
        "The sensitivity of single blocks was not measured (ptq quantize --high-precision auto does): there is no chart."
    )
    return None


def _read_calibration(
    evaluation: Path, checkpoint: Path, manifest: Manifest, omissions: list[str]
) -> CalibrationInfo | None:
    if manifest.calibration is None:
        return None
    info = find_calibration(evaluation, checkpoint, manifest.calibration["digest"])
    if info is None:
        omissions.append(
            "The calibration directory was not found beside the checkpoint: size and steps of the recorded runs are not in this report; their digest and prompts are."
        )
    return info


def _read_run(sources: Sources, info: RunSide, role: str, omissions: list[str]) -> Run | None:
    directory = find_run(sources, info, role)
    if directory is not None:
        return read_run(directory)
    found = info.directory or info.file or "no directory"
    omissions.append(
        f"The {role} run ({found}) was not found (pass --{role}): its videos and prompts are not in this report."
    )
    return None


def _read_ablation(path: Path | None) -> Ablation | None:
    if path is None:
        return None
    advice = "Expected a JSON object with title, columns, rows (lists of texts and numbers) and optionally note."
    table = parse(Ablation, read_json(path), path, advice)
    if any(len(row) != len(table.columns) for row in table.rows):
        raise PtqError(f"{path}: every row needs {len(table.columns)} cells, one for each column.")
    return table
