"""How far a calibration directory is: prompts recorded, shards at work. Reads only; loads no model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptq.calibration.directory import STATE_DIR
from ptq.calibration.records import RECORDS_DIR, SETTINGS_FILE
from ptq.errors import DamagedFileError
from ptq.store.files import read_json
from ptq.store.locks import live_shards


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
    """Read the state of a calibration directory.

    Raises:
        DamagedFileError: its settings are damaged.
    """
    settings = read_json(directory / SETTINGS_FILE)
    if not isinstance(settings, dict) or not isinstance(settings.get("samples"), list):
        raise DamagedFileError(f"{directory / SETTINGS_FILE} is damaged: it lists no samples.")
    done = len(list((directory / RECORDS_DIR).glob("[!.]*.safetensors")))
    running = live_shards(directory / STATE_DIR)
    return CalibrationStatus(str(directory), len(settings["samples"]), done, bool(settings.get("complete")), running)
