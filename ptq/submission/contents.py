"""An unpacked submission: where its parts lie, and each part read once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ptq import limits
from ptq.checkpoint.manifest import Manifest, read_manifest
from ptq.errors import DamagedFileError
from ptq.evaluation.runs import Run, Unit
from ptq.store.calibration import FILE as CALIBRATION_FILE
from ptq.store.calibration import CalibrationInfo, read_calibration
from ptq.store.evaluation import ROLES, Evaluation, read_evaluation
from ptq.store.evaluation_units import UnitLine, read_units
from ptq.store.run_info import RunInfo, read_run_info
from ptq.store.run_manifest import FILE_KEYS, ManifestLine, read_lines
from ptq.wan.identity import ModelIdentity, identify_model
from ptq.wan.layout import ModelLayout, read_layout

CHECKSUMS = "SHA256SUMS"
WEIGHTS, EVALUATION, RUNS, SOURCE, REPORT = "weights", "evaluation", "runs", "source", "report"
CALIBRATION = f"calibration/{CALIBRATION_FILE}"


@dataclass(frozen=True)
class Contents:
    """The folder that an archive was unpacked into, and the names of its members. Reading raises what the readers raise."""

    root: Path
    names: Collection[str]

    @property
    def weights(self) -> Path:
        return self.root / WEIGHTS

    def run_directory(self, role: str) -> Path:
        return self.root / RUNS / role

    def text(self, name: str) -> bytes:
        """A member that is read whole.

        Raises:
            DamagedFileError: it is missing, or larger than any that `ptq package` writes.
        """
        path = self.root / name
        if not path.is_file():
            raise DamagedFileError(f"{name} is missing")
        if path.stat().st_size > limits.ARCHIVE_TEXT_BYTES:
            raise DamagedFileError(
                f"{name} has {path.stat().st_size} bytes, at most {limits.ARCHIVE_TEXT_BYTES} are read"
            )
        return path.read_bytes()

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.weights)

    @cached_property
    def layout(self) -> ModelLayout:
        return read_layout(self.weights)

    @cached_property
    def identity(self) -> ModelIdentity:
        """Digest of the weights, and the format that they say themselves."""
        return identify_model(WEIGHTS, self.weights)

    @cached_property
    def evaluation(self) -> Evaluation:
        return read_evaluation(self.root / EVALUATION)

    @cached_property
    def units(self) -> list[UnitLine]:
        return read_units(self.root / EVALUATION)

    @cached_property
    def calibration(self) -> CalibrationInfo | None:
        return read_calibration(self.root / CALIBRATION) if CALIBRATION in self.names else None

    @cached_property
    def infos(self) -> dict[str, RunInfo]:
        """Role -> run.json."""
        return {role: read_run_info(self.run_directory(role)) for role in ROLES}

    @cached_property
    def lines(self) -> dict[str, dict[str, ManifestLine]]:
        """Role -> unit -> its line in the manifests, failed units included."""
        return {role: read_lines(self.run_directory(role)) for role in ROLES}

    @cached_property
    def runs(self) -> dict[str, Run]:
        """Role -> the run as its manifests tell it, whether or not its files are here."""
        found = {}
        for role, lines in self.lines.items():
            directory = self.run_directory(role)
            units = {name: Unit(line, directory) for name, line in lines.items() if line.is_done}
            unusable = {name: f"failed: {line.error}" for name, line in lines.items() if not line.is_done}
            found[role] = Run(directory, self.infos[role], units, unusable)
        return found

    def measured_files(self) -> dict[str, str]:
        """Member -> its sha256 in the manifest, of every video, latent and array of frames that the manifests name."""
        return {
            f"{RUNS}/{role}/{getattr(line, key)}": str(getattr(line, f"{key}_sha256"))
            for role, lines in self.lines.items()
            for line in lines.values()
            for key in FILE_KEYS
            if line.is_done and getattr(line, key)
        }

    @cached_property
    def has_measured_files(self) -> bool:
        """Whether what was measured is in the archive: all of it, which `check_members` makes sure of."""
        return any(name in self.names for name in self.measured_files())
