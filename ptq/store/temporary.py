"""Temporary folders that do not outlive their process: removed on every exit, swept at the next start where it was killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """An empty folder `<prefix><process id>-...` while the block runs; first, what dead processes left of that prefix goes.

    Args:
        prefix: "ptq-verify-"; of one kind of folder only.
    """
    sweep(prefix)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        yield Path(folder)


def sweep(prefix: str) -> None:
    """Remove this user's folders of that prefix whose process is dead."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,9})-\w+")
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])) and _is_own_folder(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_own_folder(path: Path) -> bool:
    try:
        return path.is_dir() and not path.is_symlink() and path.lstat().st_uid == os.getuid()
    except OSError:
        return False  # gone meanwhile


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
