"""Who works on a directory: one lock for each shard, one mutex for the moments in which two processes must not meet.

Locks are flock(2): the kernel drops them when a process dies, however it dies. Shared by `ptq calibrate` and
`ptq generate`; claims on single units are `ptq/generation/claims.py`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.errors import PtqError
from ptq.limits import OWNER_BYTES
from ptq.store.ending import at_end
from ptq.store.sharding import Shard
from ptq.store.strict_json import parse_json, read_bounded

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_MUTEX, _LOCK_SUFFIX = "directory.lock", ".lock"
_RETRY_S = 1.0
"""`ptq status` holds a shared lock, and claims hold the mutex, for an instant."""


def owner() -> dict[str, Any]:
    """Who this process is, for messages."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def _write_owner(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(owner()).encode(), 0)


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


def _flock_soon(handle: int) -> bool:
    """Take an exclusive lock, trying again for a moment; False when another process keeps it."""
    deadline = time.monotonic() + _RETRY_S
    while not _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def directory_mutex(state: Path) -> Iterator[None]:
    """Hold the directory for a moment: start-up checks, replacing a stale claim."""
    state.mkdir(parents=True, exist_ok=True)
    path = state / _MUTEX
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _flock_soon(handle):
            ui.info(f"Waiting for {describe_holder(path)} to begin its work in {state.parent}.")
            _flock(handle, fcntl.LOCK_EX)
        _write_owner(handle)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file while the block runs; it is removed afterwards.

    Args:
        path: the lock file. what: what it stands for, for the message.

    Raises:
        PtqError: another process holds it; says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with at_end(lambda: _remove_free_lock(path)):
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                os.close(handle)
                raise PtqError(
                    f"{what} is in use by {describe_holder(path)}. Wait for it, stop it, or choose another --out."
                )
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
            os.close(handle)  # the former owner removed the file between our two calls
        try:
            with at_end(lambda: path.unlink(missing_ok=True)):
                _write_owner(handle)
                yield
        finally:
            os.close(handle)


def _remove_free_lock(path: Path) -> None:
    """Remove a lock file that nobody holds: this process was ended between making it and holding it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(handle)


@contextlib.contextmanager
def shard_lock(state: Path, shard: Shard) -> Iterator[None]:
    """Hold the exclusive right to one shard of a directory while the block runs.

    Raises:
        PtqError: another process works on this shard; says which.
    """
    path = state / f"shard-{shard.tag}{_LOCK_SUFFIX}"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _flock_soon(handle):
            raise PtqError(
                f"{state.parent} is in use: {describe_holder(path)} is making this shard. Wait for it, stop it, or choose another --out or another --shard."
            )
        _write_owner(handle)
        yield
    finally:
        os.close(handle)


def refuse_other_counts(state: Path, shard: Shard) -> None:
    """Shards of one directory that run at the same time belong to one N.

    Raises:
        PtqError: a process works on a shard of another N.
    """
    foreign = [tag for tag in live_shards(state) if tag.rpartition("of")[2] != str(shard.count)]
    if foreign:
        raise PtqError(
            f"{state.parent} is in use by shard {', '.join(foreign)} of a run with another number of shards than {shard.count}. Wait for it, or use the same N in --shard i/N."
        )


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


def describe_holder(path: Path) -> str:
    """Who wrote a lock or claim file, for messages: process, machine, since when."""
    holder = read_small_json(path)
    if not holder:
        return "another process"
    return ui.shorten(f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('started')})", 200)


def read_small_json(path: Path) -> dict[str, Any]:
    """A small JSON object that another process may be writing right now; {} when it is not readable as one."""
    try:
        value = parse_json(read_bounded(path, OWNER_BYTES))
    except (OSError, ValueError, PtqError):
        return {}
    return value if isinstance(value, dict) else {}
