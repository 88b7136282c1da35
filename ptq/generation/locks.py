"""Who works on what: one lock for each shard, one mutex for the directory, one claim file for each unit in work.

Locks are flock(2): the kernel drops them when a process dies, however it dies. Claims are files made with O_EXCL on the
shared file system, touched while the work goes on; they work between machines. A claim whose owner has been silent for
`stale_seconds` may be replaced. Losing a race costs work done twice, never a wrong file: every unit's bytes depend on its
name only, and files appear by rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.errors import PtqError
from ptq.generation.sharding import Shard

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_MUTEX, _LOCK_SUFFIX, _CLAIM_SUFFIX = "directory.lock", ".lock", ".claim"
_PROBE_RETRY_S = 1.0  # `ptq status` holds a shared lock for an instant


def owner() -> dict[str, Any]:
    """Who this process is, for messages."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def _flock(handle: int, operation: int) -> bool:
    """Take a lock; False when another process holds it."""
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        ui.warn("This file system has no locks: make sure that no other process makes the same shard.")
    return True


@contextlib.contextmanager
def directory_mutex(state: Path) -> Iterator[None]:
    """Hold the directory for a moment: start-up checks, replacing a stale claim."""
    state.mkdir(parents=True, exist_ok=True)
    handle = os.open(state / _MUTEX, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class ShardLock:
    """The exclusive right to one shard of a directory, from `acquire` until `release` or the end of the process."""

    def __init__(self, state: Path, shard: Shard) -> None:
        self._path, self._handle = state / f"shard-{shard.tag}{_LOCK_SUFFIX}", -1

    def acquire(self) -> None:
        """Take the lock, or refuse.

        Raises:
            PtqError: another process works on this shard; says which.
        """
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + _PROBE_RETRY_S
        while not _flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if time.monotonic() > deadline:
                holder = _describe(self._path)
                self.release()
                raise PtqError(
                    f"{self._path.parent.parent} is in use: {holder} is making this shard. Wait for it, stop it, or "
                    "choose another --out or another --shard."
                )
            time.sleep(0.05)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps(owner()).encode(), 0)

    def release(self) -> None:
        """Let go of the shard."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def live_shards(state: Path) -> list[str]:
    """Tags (`0of3`) of the shards that a process is working on now, as far as this machine can see."""
    tags = []
    for path in sorted(state.glob(f"shard-*{_LOCK_SUFFIX}")):
        handle = os.open(path, os.O_RDONLY)
        try:
            if not _flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB):
                tags.append(path.name.removeprefix("shard-").removesuffix(_LOCK_SUFFIX))
        finally:
            os.close(handle)
    return tags


def _describe(path: Path) -> str:
    holder = _read_json(path)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('started')})"


def _read_json(path: Path) -> dict[str, Any]:
    """A small JSON object that another process may be writing right now; {} when it is not readable as one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Claims:
    """Claim files of one process. A background thread touches the claim in hand; use as a context manager."""

    def __init__(self, state: Path, shard: Shard, stale_seconds: float) -> None:
        self._state, self._shard, self.stale_seconds = state, shard, stale_seconds
        self._held: Path | None = None
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
        content = json.dumps({"shard": self._shard.tag, **owner()}).encode()
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            with directory_mutex(self._state):
                if self.is_held_elsewhere(stem):
                    return False
                path.write_bytes(content)
        else:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        self._held = path
        return True

    def release(self) -> None:
        """Give up the claim in hand, if any."""
        if self._held is not None:
            held, self._held = self._held, None
            if _read_json(held).get("shard") == self._shard.tag:  # else: another process took it over meanwhile
                held.unlink(missing_ok=True)

    def is_held_elsewhere(self, stem: str) -> bool:
        """Whether a process that still gives signs of life claims this unit.

        A claim of this shard, or of another number of shards, is left over from a dead process: the shard lock says so.
        """
        path = self._path(stem)
        try:
            modified = path.stat().st_mtime
        except FileNotFoundError:
            return False
        tag = str(_read_json(path).get("shard", ""))
        if tag == self._shard.tag or (tag and tag.rpartition("of")[2] != str(self._shard.count)):
            return False
        return self._now() - modified < self.stale_seconds

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
                with contextlib.suppress(FileNotFoundError):  # released between the two lines
                    os.utime(held)


def units_in_work(state: Path) -> dict[str, str]:
    """Shard tag -> file stem of the unit that it claims now (dead claims included)."""
    claims = {}
    for path in sorted(state.glob(f"*{_CLAIM_SUFFIX}")):
        tag = _read_json(path).get("shard")
        if tag:
            claims[str(tag)] = path.name.removesuffix(_CLAIM_SUFFIX)
    return claims
