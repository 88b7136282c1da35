"""Who works on a unit: one claim file for each unit in work, so that idle shards can take over what others left.

Claims are files on the shared file system, touched while the work goes on; they work between machines. They appear whole, by
rename, while the directory's mutex is held. A claim whose owner has been silent for `stale_seconds`, or that names no
owner, is dead and may be replaced. Where a file system has no locks a race may be lost: that costs work done twice, never a
wrong file, for every unit's bytes depend on its name only, and files appear by rename.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection
from pathlib import Path

from ptq.store.ending import at_end
from ptq.store.files import write_json
from ptq.store.locks import describe_holder, directory_mutex, owner, read_small_json
from ptq.store.sharding import Shard

_CLAIM_SUFFIX = ".claim"


class Claims:
    """Claim files of one process. A background thread touches the claim in hand; use as a context manager."""

    def __init__(self, state: Path, shard: Shard, stale_seconds: float) -> None:
        self._state, self._shard, self.stale_seconds = state, shard, stale_seconds
        self._held: Path | None = None
        self._ending = contextlib.ExitStack()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="claim-heartbeat", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.release()

    def acquire(self, stem: str) -> bool:
        """Claim the unit with this file stem; False while another living process has it."""
        path = self._path(stem)
        with directory_mutex(self._state):
            if self.is_held_elsewhere(stem):
                return False
            self._ending.enter_context(at_end(self._remove_held))
            self._held = path
            write_json(path, {"shard": self._shard.tag, **owner()})
        return True

    def release(self) -> None:
        """Give up the claim in hand, if any."""
        self._ending.close()

    def _remove_held(self) -> None:
        held, self._held = self._held, None
        if held is not None and self._shard_of(held) == self._shard.tag:  # else: another process took it over meanwhile
            held.unlink(missing_ok=True)

    def sweep(self, finished: Collection[str]) -> None:
        """Remove the dead claims of units with these file stems: their process was killed after the unit's last file."""
        for path in sorted(self._state.glob(f"*{_CLAIM_SUFFIX}")):
            stem = path.name.removesuffix(_CLAIM_SUFFIX)
            if stem in finished:
                with directory_mutex(self._state):
                    if not self.is_held_elsewhere(stem):
                        path.unlink(missing_ok=True)

    def is_held_elsewhere(self, stem: str) -> bool:
        """Whether a process that still gives signs of life claims this unit.

        A claim of this shard, or of another number of shards, is left over from a dead process: the shard lock says so.
        So is one that names no shard: its process, of an earlier version, was killed before it had written it.
        """
        path = self._path(stem)
        try:
            modified = path.stat().st_mtime
        except FileNotFoundError:
            return False
        tag = self._shard_of(path)
        if tag == self._shard.tag or tag.rpartition("of")[2] != str(self._shard.count):
            return False
        return self._now() - modified < self.stale_seconds

    def holder(self, stem: str) -> str:
        """Who claims this unit, for messages."""
        return describe_holder(self._path(stem))

    @staticmethod
    def _shard_of(claim: Path) -> str:
        return str(read_small_json(claim).get("shard", ""))

    def _now(self) -> float:
        """The file system's clock: machines that share it may disagree about the time."""
        probe = self._state / f"clock-{self._shard.tag}"
        probe.touch()
        return probe.stat().st_mtime

    def _path(self, stem: str) -> Path:
        return self._state / f"{stem}{_CLAIM_SUFFIX}"

    def _heartbeat(self) -> None:
        while not self._stop.wait(min(self.stale_seconds / 10, 30.0)):
            held = self._held
            if held is not None:
                with contextlib.suppress(
                    OSError
                ):  # released between the two lines; or the disk fails, as the work will say
                    os.utime(held)


def units_in_work(state: Path) -> dict[str, str]:
    """Shard tag -> file stem of the unit that it claims now (dead claims included)."""
    claims = {}
    for path in sorted(state.glob(f"*{_CLAIM_SUFFIX}")):
        tag = read_small_json(path).get("shard")
        if tag:
            claims[str(tag)] = path.name.removesuffix(_CLAIM_SUFFIX)
    return claims
