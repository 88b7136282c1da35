"""Files that are either whole or absent: atomic writes, digests, append-only JSON lines.

Not a storage layer: plain functions on paths. Every artifact of the package is written through `atomic_path` (temporary
name in the same folder, flush, fsync, rename), so that a killed process leaves no half-written file under a final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq.errors import DamagedFileError, PtqError
from ptq.limits import LINE_BYTES, LINES_BYTES
from ptq.store.strict_json import parse_json, read_bounded

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL_SUFFIX = ".part"
"""Ends the temporary name `.<name>.<process id>.part`."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, on any error remove it.

    Raises:
        PtqError: the disk is full or not writable (names the target and the free space).
    """
    path = Path(path)
    # Process id in the name: two processes that write the same target never share a temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise PtqError(f"Could not write {path}: {error.strerror or error}. {free_space_hint(path.parent)}") from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def sweep_partials(directory: Path, targets: Container[Path] | None = None) -> None:
    """Remove what killed processes left of files below `directory` that they were writing; nobody may be writing them now.

    Args:
        targets: only what was to become one of these; None: of every file.
    """
    for path in directory.rglob(f".*{PARTIAL_SUFFIX}"):
        name = path.name.removeprefix(".").rsplit(".", 2)[0]
        if targets is None or path.with_name(name) in targets:
            path.unlink(missing_ok=True)


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
    """Append one record as one line and flush it to disk. A torn last line left by a killed writer is closed first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
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
