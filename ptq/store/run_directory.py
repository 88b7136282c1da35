"""A directory that a killed command leaves behind and the same command continues.

The rules that all stages share: who works on it is locked; the settings that decide its content are written first, and
whoever comes later asks for the same or is refused with the differences named; `fresh` starts over; what killed processes
were writing is swept. Which parts are finished is the stage's own business: each knows its files best.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ptq import ui
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.store.embeddings import FOLDER as EMBEDDINGS
from ptq.store.files import sweep_partials
from ptq.store.locks import directory_mutex, exclusive, live_shards, refuse_other_counts, shard_lock
from ptq.store.sharding import Shard

STATE_DIR = "state"
"""Folder of the locks and of what can be made again; may be deleted when nothing runs."""
SHOWN_DIFFERENCES = 20
"""Settings that a refusal names; a foreign file may differ in any number of keys."""


class Difference(NamedTuple):
    """A setting of the run that is there, and of the one that is asked for."""

    name: str
    before: Any
    after: Any


class OutputDirectory:
    """A directory that a stage takes as its own: an empty one, or one with its settings file.

    path: the directory. settings_path: the JSON file that says how its content is made. state: folder of the locks.
    """

    kind: ClassVar[str]
    """What it is, for messages: "generation directory"."""
    settings_file: ClassVar[str]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings_path, self.state = self.path / self.settings_file, self.path / STATE_DIR

    def foreign(self) -> str | None:
        """Why a directory without settings file cannot be taken, as a whole message."""
        if all(path == self.state for path in self.path.iterdir()):
            return None
        return f"{self.path} holds other files and is not a {self.kind}; choose another --out."

    def refuse_foreign(self, *, locked: bool = True) -> None:
        """Refuse a directory of something else. Unlocked, one with a state folder is left to the check under the lock:
        another process may be starting in it right now.

        Raises:
            UsageError: says what is there.
        """
        if self.settings_path.exists() or not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is a file and not a {self.kind}; choose another --out.")
        message = self.foreign()
        if message is None or self.settings_path.exists():  # another process may have begun since the first look
            return
        if locked or not self.state.is_dir():
            raise UsageError(message)


class RunDirectory(OutputDirectory, ABC):
    """One stage's directory, as one process sees it; a stage says what is its own.

    shard: the part of this process.
    """

    def __init__(self, path: str | Path, shard: Shard | None = None) -> None:
        super().__init__(path)
        self.shard = shard or Shard()

    @abstractmethod
    def found(self) -> Mapping[str, Any] | None:
        """Settings of the run that is there, under the names of the messages; None in a new directory."""

    def begun(self) -> bool:
        """Whether there is something that must not be mixed with what other settings make."""
        return True

    @abstractmethod
    def refusal(self, different: list[Difference]) -> PtqError:
        """The error for other settings without `fresh`."""

    @abstractmethod
    def delete(self, *, own: bool) -> None:
        """Delete what the run made; `own`: only the part of this shard."""

    def targets(self) -> Container[Path]:
        """The files that only this process writes."""
        return ()

    @abstractmethod
    def write_settings(self, *, anew: bool) -> None:
        """Write the settings file where it must change; `anew`: there is nothing to continue."""

    def refuse_other(self, wanted: Mapping[str, Any], *, fresh: bool) -> None:
        """Refuse without a lock, before long work, what `hold` will refuse: something else, or other settings.

        Raises:
            UsageError: the directory is of something else. PtqError: the run differs.
        """
        self.refuse_foreign(locked=False)
        different = [] if fresh else _differences(self.found(), wanted)
        if different and self.begun():
            raise self.refusal(different)

    @contextmanager
    def hold(self, wanted: Mapping[str, Any], *, fresh: bool) -> Iterator[None]:
        """Hold the shard while the block runs; before, check, start over if asked to, sweep, and write the settings.

        Raises:
            UsageError: the directory is of something else.
            PtqError: another process makes this shard, or shards of another N; the run differs.
        """
        self.refuse_foreign(locked=False)  # before anything is written into it
        with ExitStack() as held:
            with directory_mutex(self.state):
                held.enter_context(shard_lock(self.state, self.shard))
                self.refuse_foreign()
                refuse_other_counts(self.state, self.shard)
                anew = self.enter(wanted, fresh=fresh)
                sweep_partials(self.path, self.targets())
                self.write_settings(anew=anew)
            yield

    def enter(self, wanted: Mapping[str, Any], *, fresh: bool) -> bool:
        """Continue, refuse, or start over; returns whether there is nothing to continue.

        Raises:
            PtqError: `refusal`, or another process is at work with other settings.
        """
        try:
            found = self.found()
        except DamagedFileError:
            if not fresh:
                raise
            found = {}
        different = _differences(found, wanted)
        if different and not fresh and self.begun():
            raise self.refusal(different)
        others = [tag for tag in live_shards(self.state) if tag != self.shard.tag]
        if different and others:
            raise PtqError(
                f"Shard {', '.join(others)} is at work in {self.path} with other settings; different: {name_all(different)}. Stop it first, or choose another --out."
            )
        if fresh:
            part = not different and self.shard.count > 1
            self.delete(own=part)
            if not part:
                shutil.rmtree(self.state / EMBEDDINGS, ignore_errors=True)
        return fresh or found is None or bool(different)


def _differences(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> list[Difference]:
    keys = dict.fromkeys([*(found or ()), *wanted]) if found is not None else ()
    pairs = [Difference(key, (found or {}).get(key), wanted.get(key)) for key in keys]
    return [pair for pair in pairs if pair.before != pair.after]


def name_all(different: list[Difference]) -> str:
    """Names of the settings, for a message; of the groups and keys that differ where a setting has some."""
    names = [ui.shorten(name) for one in different for name in _names(*one)]
    more = f" and {len(names) - SHOWN_DIFFERENCES} more" if len(names) > SHOWN_DIFFERENCES else ""
    return ", ".join(names[:SHOWN_DIFFERENCES]) + more


def _names(name: str, before: Any, after: Any) -> list[str]:
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return [name]
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [inner for key in keys for inner in _names(f"{name}.{key}", before.get(key), after.get(key))]


@contextmanager
def hold_whole(directory: Path) -> Iterator[None]:
    """Hold a directory that has no shards while the block runs, by a file beside it: it need not exist yet.

    Raises:
        PtqError: another process holds it; says which.
    """
    path = directory.absolute()
    with exclusive(path.with_name(f".{path.name}.lock"), str(directory)):
        yield
