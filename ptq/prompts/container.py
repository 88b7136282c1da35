"""From the bytes of a prompt file to its entries, one at a time, whatever the size of the file.

Knows JSON lists, JSON objects, JSON lines and plain lines; knows nothing of what the entries mean (`formats.py` does).
JSON is always parsed incrementally with ijson: the native OpenS2V-5M files are 32-66 GB, and for the 1 MB files it is
as fast as the json module (1,000 records in 6 ms against 8 ms), so there is one code path and no size threshold. The
digest of the file is taken in the same pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ijson

from ptq import ui
from ptq.errors import DamagedFileError, PtqError

Container = Literal["list", "map", "lines", "text"]
CONTAINER_TEXT = {
    "list": "a JSON list",
    "map": "a JSON object of records",
    "lines": "JSON lines",
    "text": "plain lines",
}

SNIFF_BYTES = 1 << 20
BUFFER_BYTES = 1 << 16
PROGRESS_BYTES = 256 << 20
"""Files from this size on show progress."""

PROGRESS_STEP = 16 << 20
EXPLAIN_BYTES = 64 << 20
"""Syntax errors in files up to this size are located to the line by a second parse."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DigestingFile(io.RawIOBase):
    """A file opened for one sequential pass that hashes, and reports as progress, every byte that is read."""

    def __init__(self, path: Path, bar: ui.Progress | None = None) -> None:
        self._file = io.FileIO(path, "rb")
        self._sha256 = hashlib.sha256()
        self._bar, self._unreported = bar, 0
        self.buffered: io.BufferedReader[Any] = io.BufferedReader(self, BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._sha256.update(memoryview(buffer)[:count])
        self._unreported += count
        if self._bar is not None and self._unreported >= PROGRESS_STEP:
            self._bar.advance(self._unreported // PROGRESS_STEP)
            self._unreported %= PROGRESS_STEP
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def finish(self) -> str:
        """Read to the end of the file; the hex SHA-256 of all of it."""
        scratch = bytearray(1 << 20)
        while self.readinto(scratch):
            pass
        if self._bar is not None and self._unreported:
            self._bar.advance()
            self._unreported = 0
        return self._sha256.hexdigest()


@contextlib.contextmanager
def open_digesting(path: Path) -> Iterator[DigestingFile]:
    """Open `path` for one hashed pass; large files show progress while the block runs."""
    size = path.stat().st_size
    with contextlib.ExitStack() as stack:
        bar = None
        if size >= PROGRESS_BYTES:
            total = -(-size // PROGRESS_STEP)
            bar = stack.enter_context(ui.progress(f"Reading {path.name} (pieces of 16 MiB)", total))
        yield stack.enter_context(DigestingFile(path, bar))


def sniff_container(path: Path, *, plain: bool = False) -> Container:
    """Which container a file is, from its suffix and its first bytes.

    `.txt` is plain lines and `.jsonl` / `.ndjson` JSON lines; anything else goes by its first character. A file that
    starts with "{" is JSON lines when its first line is a whole object and another object starts on the next line.

    Args:
        plain: the user said that the file is plain lines.

    Raises:
        PtqError: no such file, a directory, an empty file, or neither JSON nor `.txt`.
    """
    if path.is_dir() or not path.exists():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise PtqError(f"The prompt file {path} {found}. Name a .json, .jsonl or .txt file.")
    try:
        with open(path, "rb") as handle:
            head = handle.read(SNIFF_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    except OSError as error:
        raise PtqError(f"The prompt file {path} cannot be read: {error.strerror or error}.") from error
    if not head:
        raise PtqError(f"The prompt file {path} is empty: expected at least one prompt.")
    if plain or path.suffix.lower() == ".txt":
        return "text"
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return "lines"
    if head[:1] == b"[":
        return "list"
    if head[:1] == b"{":
        first, newline, rest = head.partition(b"\n")
        return "lines" if newline and rest.lstrip()[:1] == b"{" and _is_json(first) else "map"
    raise PtqError(
        f"The prompt file {path} is neither UTF-8 JSON (it starts with {head[:20].decode('utf-8', 'replace')!r}) nor named .txt. If it has one prompt a line, rename it to .txt or pass --prompt-format txt."
    )


def iter_entries(path: Path, container: Container, source: DigestingFile) -> Iterator[tuple[str, Any]]:
    """Yield (name of the entry, value) in file order; names are `[17]`, `"key"` or `line 18`.

    Values are JSON values, or str for plain lines. Memory is bounded by the largest single entry.

    Raises:
        DamagedFileError: broken or truncated JSON, or bytes that are not UTF-8; the text says where.
    """
    handle = source.buffered
    if handle.peek(3).startswith(BYTE_ORDER_MARK):
        handle.read(3)
    if container in ("lines", "text"):
        yield from _iter_lines(path, container, handle)
        return
    last = None
    try:
        for index, item in enumerate(
            ijson.kvitems(handle, "", use_float=True)
            if container == "map"
            else ijson.items(handle, "item", use_float=True)
        ):
            name, value = (f'"{item[0]}"', item[1]) if container == "map" else (f"[{index}]", item)
            yield name, value
            last = name
    except (ijson.JSONError, UnicodeDecodeError) as error:
        where = f"after record {last}" if last is not None else "in its first records"
        raise DamagedFileError(
            f"{path} is not valid JSON: it breaks off {where} ({_locate(path, error)}). Was the file cut short while it was copied, or edited by hand?"
        ) from error


def _iter_lines(path: Path, container: Container, handle: io.BufferedReader[Any]) -> Iterator[tuple[str, Any]]:
    for number, raw in enumerate(handle, 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DamagedFileError(f"{path}, line {number} is not UTF-8 text ({error}). Save it as UTF-8.") from error
        if not line:
            continue
        if container == "text":
            yield f"line {number}", line
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DamagedFileError(f"{path}, line {number} is not valid JSON ({error}).") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _locate(path: Path, error: Exception) -> str:
    """Line and column of a syntax error where the file is small enough to parse again; else the parser's own words."""
    if os.path.getsize(path) <= EXPLAIN_BYTES:
        try:
            json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as located:
            return str(located)
    what, *context = str(error).strip().splitlines()
    return f"{what} Near: {' '.join(context[0].split())}" if context else what
