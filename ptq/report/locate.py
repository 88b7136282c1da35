"""Where the artifacts of one report lie, given an evaluation or demo directory.

The evaluation records both run directories and the checkpoint's name as they were then. They are looked for there, then
beside the evaluation in the layout of `ptq demo`; a candidate counts only when its digest is the recorded one, so a
report never mixes artifacts of different jobs. What is not found is left out and stated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptq.checkpoint.manifest import MANIFEST_FILE
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.evaluation.overlap import find_weights
from ptq.store.calibration import FILE as CALIBRATION_FILE
from ptq.store.calibration import CalibrationInfo, read_calibration
from ptq.store.evaluation import FILE as EVALUATION_FILE
from ptq.store.evaluation import Evaluation, RunSide
from ptq.store.run_info import read_run_info
from ptq.wan.identity import identify_model


@dataclass(frozen=True)
class Sources:
    """Directories a report is made from; None is looked for as the module says."""

    evaluation: Path
    checkpoint: Path | None = None
    reference: Path | None = None
    candidate: Path | None = None
    ablation: Path | None = None


def evaluation_directories(run: Path) -> list[Path]:
    """The evaluation directories that RUN means: itself, or those of a demo directory, sorted.

    Raises:
        PtqError: neither.
    """
    if (run / EVALUATION_FILE).is_file():
        return [run]
    found = sorted(path.parent for path in (run / "evaluation").glob(f"*/{EVALUATION_FILE}"))
    if not found:
        raise PtqError(
            f"{run} is neither an evaluation directory (no {EVALUATION_FILE}) nor a demo directory (no evaluation/<format>/{EVALUATION_FILE}). Make one with `ptq evaluate --out {run}` or `ptq demo --out {run}`."
        )
    return found


def find_checkpoint(sources: Sources, evaluation: Evaluation) -> Path | None:
    """The evaluated checkpoint.

    Raises:
        PtqError: `sources.checkpoint` is no packed checkpoint. UsageError: it is another one than was evaluated.
    """
    recorded = evaluation.candidate.checkpoint_digest
    if sources.checkpoint is not None:
        directory = sources.checkpoint
        if not (directory / MANIFEST_FILE).is_file():
            raise PtqError(
                f"{directory} is not a packed checkpoint (no {MANIFEST_FILE}). Make one with `ptq quantize`."
            )
        found = identify_model(str(directory), directory).digest
        if recorded is not None and found != recorded:
            raise UsageError(
                f"The evaluation judged a checkpoint with digest {recorded[:12]}, but {directory} has {found[:12]}. Pass the checkpoint that made the candidate run, or evaluate this one."
            )
        return directory
    if recorded is None:
        return None
    guesses = [Path(evaluation.candidate.model)] if evaluation.candidate.model else []
    if evaluation.format:
        guesses.append(sources.evaluation.resolve().parent.parent / evaluation.format)
    return find_weights(recorded, guesses)


def find_run(sources: Sources, info: RunSide, role: str) -> Path | None:
    """The generation directory of `role` ("reference" or "candidate"), or None.

    Raises:
        UsageError: the directory given for it is another run than was evaluated.
    """
    given = sources.reference if role == "reference" else sources.candidate
    if given is not None:
        if not _is_run(given, info.run_digest):
            raise UsageError(
                f"{given} is not the {role} run that was evaluated (no run.json, or another digest than {str(info.run_digest)[:12]}). Pass the directory that `ptq evaluate` read."
            )
        return given
    if info.directory is None:
        return None
    recorded = Path(info.directory)
    beside = sources.evaluation.resolve().parent.parent / "videos" / recorded.name
    return next((path for path in (recorded, beside) if _is_run(path, info.run_digest)), None)


def _is_run(directory: Path, run_digest: str | None) -> bool:
    try:
        return read_run_info(directory).digest == run_digest
    except PtqError:
        return False  # not there, or of something else


def find_calibration(evaluation: Path, checkpoint: Path, calibration_digest: str) -> CalibrationInfo | None:
    """The calibration.json with that digest beside the checkpoint or in a demo directory, or None."""
    for folder in (checkpoint.resolve().parent, evaluation.resolve().parent.parent):
        for path in sorted(folder.glob(f"*/{CALIBRATION_FILE}")):
            try:
                info = read_calibration(path)
            except DamagedFileError:
                continue  # somebody else's broken directory in the same folder: not the one that is looked for
            if info.digest == calibration_digest:
                return info
    return None
