"""A calibration directory while processes record into it: locks, the rules for continuing and for starting over.

A directory holds one set of settings. Several processes may record into it at once, each its own shard; `state/` holds
their locks and may be deleted when nothing runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptq.calibration.records import INDEX_FILE, NEGATIVE_FILE, RECORDS_DIR, SETTINGS_FILE
from ptq.errors import PtqError, UsageError
from ptq.store.files import PARTIAL_SUFFIX, read_json, write_json
from ptq.store.locks import ShardLock, directory_mutex, live_shards, refuse_other_counts
from ptq.store.sharding import Shard

STATE_DIR = "state"


@contextmanager
def open_directory(
    out: Path, settings: dict[str, Any], shard: Shard, own: Sequence[Path], *, fresh: bool
) -> Iterator[None]:
    """Hold one shard of a calibration directory while the block runs.

    Args:
        settings: what must agree before two processes may share the directory; written first, as not complete.
        own: record files of this shard.
        fresh: start over; with several shards each deletes its own files.

    Raises:
        UsageError: `out` is something else, or holds records of other settings (names the difference).
        PtqError: another process records this shard, or shards of another N.
    """
    state, lock = out / STATE_DIR, ShardLock(out / STATE_DIR, shard)
    if not state.is_dir():
        _refuse_foreign(out, locked=False)  # before anything is written into it
    with directory_mutex(state):
        lock.acquire()
        try:
            _refuse_foreign(out, locked=True)
            refuse_other_counts(state, shard)
            _enter(out, settings, shard, own, fresh)
        except BaseException:
            lock.release()
            raise
    try:
        yield
    finally:
        lock.release()


def _refuse_foreign(out: Path, *, locked: bool) -> None:
    """Refuse a directory of something else. Unlocked, one with a state folder is left to the check under the lock:
    another process may be starting in it right now."""
    if (out / SETTINGS_FILE).exists() or not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else None
    if names is None or (names - {STATE_DIR} and not (STATE_DIR in names and not locked)):
        raise UsageError(f"{out} is not empty and not a calibration directory; choose another --out.")


def _enter(out: Path, settings: dict[str, Any], shard: Shard, own: Sequence[Path], fresh: bool) -> None:
    found = read_json(out / SETTINGS_FILE) if (out / SETTINGS_FILE).exists() else None
    different = [key for key, value in settings.items() if found is not None and found.get(key) != value]
    others = [tag for tag in live_shards(out / STATE_DIR) if tag != shard.tag]
    if different and others:
        raise PtqError(
            f"Shard {', '.join(others)} is recording into {out} with other settings; different: {', '.join(different)}. Stop it first, or choose another --out."
        )
    if different and not fresh and any((out / RECORDS_DIR).glob("[!.]*")):
        raise UsageError(
            f"{out} holds records made with other settings; different: {', '.join(different)}. Records of two settings are never mixed: choose another --out, or pass --fresh to record again."
        )
    if fresh and (different or shard.count == 1):
        shutil.rmtree(out / RECORDS_DIR, ignore_errors=True)
        for name in (INDEX_FILE, NEGATIVE_FILE):
            (out / name).unlink(missing_ok=True)
    elif fresh:
        for path in own:
            path.unlink(missing_ok=True)
    if found is None or different or fresh:
        write_json(out / SETTINGS_FILE, {**settings, "complete": False})
    for path in own:  # what a killed process was writing
        for leftover in path.parent.glob(f".{path.name}.*{PARTIAL_SUFFIX}"):
            leftover.unlink(missing_ok=True)
