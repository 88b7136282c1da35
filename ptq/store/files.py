"""Files that are either whole or absent: atomic writes, digests, append-only JSON lines.

Not a storage layer: plain functions on paths. Every artifact of the package is written through `atomic_path` (temporary
name in the same folder, flush, fsync, rename), so that a killed process leaves no half-written file under a final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq.errors import FULL, DamagedFileError, PtqError, describe_os_error
from ptq.limits import LINE_BYTES, LINES_BYTES
from ptq.store.ending import at_end
from ptq.store.strict_json import parse_json, read_bounded

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL_SUFFIX = ".part"
"""Ends the temporary name `.<name>.<host>-<process id>.part`; without the host where an earlier version wrote it."""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?:(?P<host>[0-9a-f]{6})-)?(?P<pid>\d+)\.part", re.DOTALL)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, on any error remove it.

    Raises:
        PtqError: the disk is full or not writable (names the target and the reason).
    """
    path = Path(path)
    temporary = _temporary(path)
    with _writing(path), at_end(lambda: _remove(temporary)):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_once(path.parent)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)


@contextlib.contextmanager
def temporary_directory(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder below `parent` that is gone after the block; what killed processes left there is swept first.

    Raises:
        PtqError: `parent` cannot be written into.
    """
    path = _temporary(parent / name)
    with at_end(lambda: _remove(path)):
        with _writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            sweep_once(parent)
            _remove(path)
            path.mkdir()
        yield path


def scratch_directory(name: str) -> AbstractContextManager[Path]:
    """A temporary directory where the system keeps such."""
    return temporary_directory(Path(tempfile.gettempdir()), name)


def sweep_partials(directory: Path, targets: Container[Path] | None = None) -> None:
    """Remove what killed processes left of files below `directory` that they were writing.

    Args:
        targets: what only this process may write now, whoever began it; None: everything. Of other files, those go
            whose writer was a process of this machine and has ended.
    """
    for path in directory.rglob(f".*{PARTIAL_SUFFIX}"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and (targets is None or path.with_name(found["name"]) in targets or _is_left_over(found)):
            _remove(path)


_swept: set[str] = set()


def sweep_once(directory: Path) -> None:
    """The first time that this process writes into a folder, remove what ended processes of this machine left in it."""
    real = os.path.realpath(directory)
    if real in _swept:
        return
    _swept.add(real)
    for path in directory.glob(f".*{PARTIAL_SUFFIX}"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and _is_left_over(found):
            _remove(path)


def _is_left_over(found: re.Match[str]) -> bool:
    """Whether the process that a temporary name holds has ended. Of one on another machine nothing is known.

    This process's own number was an ended one's: it sweeps a folder before it writes there.
    """
    if found["host"] != _host():
        return False
    if int(found["pid"]) == os.getpid():
        return True
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's process; no process at all
        return False
    return False


@cache
def _host() -> str:
    """Six digits that differ between machines, and between containers that count processes on their own."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return hashlib.sha256(f"{socket.gethostname()} {processes}".encode()).hexdigest()[:6]


def _temporary(path: Path) -> Path:
    # Process id in the name: two processes that write the same target never share a temporary file.
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}{PARTIAL_SUFFIX}")


def _remove(path: Path) -> bool:
    """Remove a file or a whole folder, where that is possible: the reason why it is removed matters more."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    return not os.path.lexists(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the system while `path` is written, as a message about it; those of other files stay what they are."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if named is not None and not (isinstance(named, str) and _is_of(Path(named), path)):
            raise
        advice = free_space_hint(path.parent) if error.errno in FULL else ""
        raise PtqError(f"Could not write {describe_os_error(error, path, advice)}") from error


def _is_of(found: Path, path: Path) -> bool:
    """Whether an error at `found` is one of writing `path`: itself, a folder that it is in, its temporary, its content."""
    temporary = found.parent == path.parent and found.name.startswith(f".{path.name}.")
    return temporary or found.parent == path or found in (path, *path.parents)


def files_below(directory: Path) -> list[Path]:
    """All files in and below a directory, sorted; linked folders count as folders (components may be links)."""
    found = (Path(root) / name for root, _, names in os.walk(directory, followlinks=True) for name in names)
    return sorted(path for path in found if path.is_file())


def sync_directory(directory: Path) -> None:
    """Flush a directory entry, so that a rename survives a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_space_hint(directory: Path) -> str:
    """One sentence with the free space of the disk that holds `directory`."""
    try:
        stats = os.statvfs(directory)
    except OSError:
        return "Choose another --out."
    free = stats.f_bavail * stats.f_frsize
    return (
        f"{free / 1e9:.2f} GB are free there; free some space or choose another --out, then run the same command again."
    )


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically. NaN and infinities are refused (ValueError)."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: str | Path, *, nan: bool = False) -> Any:
    """Read a JSON file, within the limits and strictness of `ptq.store.strict_json`; `nan` as `parse_json`.

    Raises:
        PtqError: the file does not exist.
        DamagedFileError: it is not JSON; the text has line and column.
    """
    path = Path(path)
    try:
        return parse_json(read_bounded(path), nan=nan)
    except ValueError as error:
        raise DamagedFileError(
            f"{path} is not valid JSON ({error}). Restore it from a copy, or make it again with the command that made it."
        ) from error


def write_jsonl(path: str | Path, records: Iterable[Any]) -> None:
    """Write one JSON line for each record, atomically."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_bytes(path, "".join(lines).encode())


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        PtqError: the disk is full or not writable.
    """
    from safetensors.torch import save

    # Not `save_file`: it writes to a temporary file of its own, which a killed process leaves behind.
    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def append_jsonl(path: str | Path, record: dict[str, Any]) -> None:
    """Append one record as one line and flush it to disk. A torn last line left by a killed writer is closed first.

    Raises:
        PtqError: the disk is full or not writable.
    """
    path = Path(path)
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as handle:
            if handle.tell() > 0:
                handle.seek(-1, os.SEEK_END)
                if handle.read(1) != b"\n":
                    line = b"\n" + line
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())


def read_jsonl(path: str | Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """Read JSON lines; blank lines are ignored, and so is a torn last line (a writer was killed).

    Args:
        skip_damaged: also ignore damaged lines elsewhere instead of refusing the file.

    Raises:
        DamagedFileError: a line in the middle is not a JSON object; the text names file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = read_bounded(path, LINES_BYTES).split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_line(line)
        except ValueError as error:
            torn_last_line = number == len(lines)
            if torn_last_line or skip_damaged:
                continue
            raise DamagedFileError(f"{path}, line {number} is not a JSON object ({error}).") from error
        records.append(record)
    return records


def parse_line(line: bytes) -> dict[str, Any]:
    """One JSON line.

    Raises:
        ValueError: not a JSON object, or more or other than `ptq.store.strict_json` reads.
    """
    if len(line) > LINE_BYTES:
        raise ValueError(f"it is longer than {LINE_BYTES >> 20} MiB")
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-like value, independent of key order."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()
