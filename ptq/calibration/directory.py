"""A calibration directory while processes record into it, each its own shard of the prompts; and how far it is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.errors import UsageError
from ptq.store.calibration import FILE, CalibrationInfo, Step, read_calibration
from ptq.store.files import sha256_file
from ptq.store.locks import directory_mutex, live_shards
from ptq.store.records import INDEX_FILE, NEGATIVE_FILE, RECORDS_DIR, prompt_file, read_embeds, read_prompt_records
from ptq.store.run_directory import STATE_DIR, Difference, RunDirectory, name_all
from ptq.store.sharding import Shard


class CalibrationDirectory(RunDirectory):
    """Settings, record files and locks of one recording.

    Args:
        info: what must agree before two processes may share the directory.
        own: positions of this shard's prompts.
    """

    kind, settings_file = "calibration directory", FILE

    def __init__(self, out: Path, info: CalibrationInfo, shard: Shard, own: Sequence[int]) -> None:
        super().__init__(out, shard)
        self._info, self._own = info, [prompt_file(self.path, index) for index in own]
        self._kept: dict[str, str] = {}

    @property
    def info(self) -> CalibrationInfo:
        """calibration.json as it is now."""
        return read_calibration(self.settings_path)

    def begin(self, schedule: list[Step]) -> None:
        """Something is recorded, anew or again: the set is not complete; digests of files that are there are kept."""
        with directory_mutex(self.state):
            self._write(schedule=schedule, files=self.info.files)

    def vouch(self, *paths: Path) -> None:
        """Note the digests of files that were just made: a file without is never reused."""
        with directory_mutex(self.state):
            info = self.info
            made = {path.name: sha256_file(path) for path in paths}
            info.model_copy(update={"files": info.files | made}).write(self.settings_path)

    def adopt_earlier(self) -> None:
        """Keep what an earlier version left unfinished: it noted no digests before the end, so headers are all to go by."""
        with directory_mutex(self.state):
            info = self.info
            if info.complete or "files" in info.model_fields_set:
                return
            found = [path for path in sorted((self.path / RECORDS_DIR).glob("[!.]*")) if read_prompt_records(path)]
            negative = self.path / NEGATIVE_FILE
            found += [negative] if read_embeds(negative) is not None else []
            files = {path.name: sha256_file(path) for path in found}
            info.model_copy(update={"files": files}).write(self.settings_path)
        if files:
            ui.warn(
                f"{self.path} was begun by an earlier version, which noted no digests of unfinished recordings: {len(files)} files are kept by their headers alone, and compared with their digests from now on. To record them anew, pass --fresh."
            )

    def _write(self, **changes: Any) -> None:
        self._info.model_copy(update=changes).write(self.settings_path)

    def found(self) -> dict[str, Any] | None:
        """What decided the records that are there."""
        return read_calibration(self.settings_path).decisive() if self.settings_path.exists() else None

    def begun(self) -> bool:
        """A run that failed before its first record does not occupy the directory."""
        return any((self.path / RECORDS_DIR).glob("[!.]*"))

    def refusal(self, different: list[Difference]) -> UsageError:
        counts = [(len(one.before), len(one.after)) for one in different if one.name == "samples"]
        hint = "".join(
            f" ({before} there, {after} asked for: --num-prompts)" for before, after in counts if before != after
        )
        return UsageError(
            f"{self.path} holds records made with other settings; different: {name_all(different)}{hint}. Records of two settings are never mixed: choose another --out, or pass --fresh to record again."
        )

    def delete(self, *, own: bool) -> None:
        if own:
            names = {path.name for path in self._own}
            self._kept = {name: value for name, value in self.info.files.items() if name not in names}
            for path in self._own:
                path.unlink(missing_ok=True)
            return
        shutil.rmtree(self.path / RECORDS_DIR, ignore_errors=True)
        for name in (INDEX_FILE, NEGATIVE_FILE):
            (self.path / name).unlink(missing_ok=True)

    def targets(self) -> set[Path]:
        return set(self._own)

    def write_settings(self, *, anew: bool) -> None:
        if anew:
            self._write(files=self._kept)


@dataclass(frozen=True)
class CalibrationStatus:
    """prompts: of all shards; done: with a record file. running: tags (`0of3`) of shards that a process holds now."""

    directory: str
    prompts: int
    done: int
    complete: bool
    running: list[str]

    def as_json(self) -> dict[str, Any]:
        """The status as a JSON object."""
        return asdict(self)

    def describe(self) -> str:
        """One sentence for people."""
        work = f"shard {', '.join(self.running)} at work" if self.running else "no process at work"
        state = "complete" if self.complete else "not complete"
        return f"{self.directory}: records of {self.done} of {self.prompts} prompts, {state}, {work}."


def read_status(directory: Path) -> CalibrationStatus:
    """Read the state of a calibration directory; writes nothing, loads no model.

    Raises:
        DamagedFileError: its settings are damaged.
    """
    info = read_calibration(directory / FILE)
    done = len(list((directory / RECORDS_DIR).glob("[!.]*.safetensors")))
    return CalibrationStatus(str(directory), len(info.samples), done, info.complete, live_shards(directory / STATE_DIR))
