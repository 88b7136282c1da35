"""From the bytes of a prompt file to its entries, one at a time, whatever the size of the file.

Knows JSON lists, JSON objects, a list under the key "prompts", JSON lines, CSV with a header and plain lines; knows nothing
of what the entries mean (`formats.py` does). JSON is always parsed incrementally with ijson: the native OpenS2V-5M files are
32-66 GB, and for the 1 MB files it is as fast as the json module (1,000 records in 6 ms against 8 ms), so there is one code
path and no size threshold. Its bytes are checked before the parser sees them: memory stays bounded whatever they hold. The
digest of the file is taken in the same pass.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ijson

from ptq import ui
from ptq.errors import DamagedFileError, PtqError, shown
from ptq.limits import LINE_BYTES, PROMPT_RECORD_BYTES, PROMPT_RECORD_VALUES
from ptq.store.strict_json import BYTE_ORDER_MARK, JsonScan, depth_after, parse_json

Container = Literal["list", "wrapped", "map", "lines", "csv", "text"]
CONTAINER_TEXT = {
    "list": "a JSON list",
    "wrapped": 'a JSON list under the key "prompts"',
    "map": "a JSON object of records",
    "lines": "JSON lines",
    "csv": "CSV",
    "text": "plain lines",
}

SNIFF_BYTES = 1 << 20
BUFFER_BYTES = 1 << 16
PROGRESS_BYTES = 256 << 20
"""Files from this size on show progress."""

PROGRESS_STEP = 16 << 20
EXPLAIN_BYTES = 8 << 20
"""Syntax errors in files up to this size are located to the line by a second parse."""

UNPAIRED = "\uffff"
"""What half of a surrogate pair is read as: no character either, and the parser lets it through ("?" is a character)."""
_WRAPPED = re.compile(rb'[{,]\s*"prompts"\s*:\s*\[')
_MAYBE_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPES = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
_PAIR_BYTES = 12


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

    `.txt` is plain lines, `.csv` is CSV, `.jsonl` / `.ndjson` JSON lines; anything else goes by its first character. A file
    that starts with "{" is JSON lines when its first line is a whole object and another object starts on the next line.

    Args:
        plain: the user said that the file is plain lines.

    Raises:
        PtqError: no such file, a directory, an empty file, or neither JSON nor `.txt`.
    """
    if path.is_dir() or not path.exists():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise PtqError(f"The prompt file {path} {found}. Name a .json, .jsonl, .csv or .txt file.")
    if not path.is_file():
        raise PtqError(
            f"The prompt file {path} is a pipe or a device, but a prompt file is read more than once. Write its content into a file first."
        )
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
    if path.suffix.lower() == ".csv":
        return "csv"
    if head[:1] == b"[":
        return "list"
    if head[:1] == b"{" and (wrapped := _WRAPPED.search(head)) and depth_after(head[: wrapped.start() + 1]) == 1:
        return "wrapped"
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
    if container == "csv":
        yield from _iter_rows(path, handle)
        return
    last = None
    checked = _CheckedJson(handle, top=2 if container == "wrapped" else 1)
    repeated: list[str] = []
    how = {"use_float": True, "map_type": lambda: _Object(repeated)}
    try:
        for index, item in enumerate(
            ijson.kvitems(checked, "", **how)
            if container == "map"
            else ijson.items(checked, "prompts.item" if container == "wrapped" else "item", **how)
        ):
            name, value = (f'"{item[0]}"', item[1]) if container == "map" else (f"[{index}]", item)
            if repeated:
                raise DamagedFileError(
                    f"{path}, record {ui.shorten(name)}: the key {shown(repeated[0])} occurs twice in one object. Correct or remove the record."
                )
            yield name, value
            last = name
    except _RefusedError as error:
        where = f"near record {ui.shorten(last)}" if last is not None else "in its first records"
        raise DamagedFileError(f"{path} is not a prompt file that can be read: {error}, {where}.") from error
    except (ijson.JSONError, ValueError, OverflowError) as error:
        where = f"after record {ui.shorten(last)}" if last is not None else "in its first records"
        raise DamagedFileError(
            f"{path} is not valid JSON: it breaks off {where} ({_locate(path, error)}). Was the file cut short while it was copied, or edited by hand?"
        ) from error


def _iter_lines(path: Path, container: Container, handle: io.BufferedReader[Any]) -> Iterator[tuple[str, Any]]:
    for number, line in _decoded_lines(path, handle):
        line = line.strip()
        if not line:
            continue
        if container == "text":
            yield f"line {number}", line
            continue
        try:
            yield f"line {number}", parse_json(line.encode())
        except ValueError as error:
            raise DamagedFileError(f"{path}, line {number} is not valid JSON ({error}).") from error


def _decoded_lines(path: Path, handle: io.BufferedReader[Any]) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end), each of bounded length."""
    for number, raw in enumerate(iter(lambda: handle.readline(LINE_BYTES + 1), b""), 1):
        if len(raw) > LINE_BYTES:
            raise DamagedFileError(
                f"{path}, line {number} is longer than {LINE_BYTES >> 20} MiB. Is it a file of prompts? A JSON file is named .json."
            )
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedFileError(f"{path}, line {number} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _iter_rows(path: Path, handle: io.BufferedReader[Any]) -> Iterator[tuple[str, Any]]:
    """Rows under the names of the header, in small letters; empty cells are left out."""
    rows = csv.reader((line for _, line in _decoded_lines(path, handle)), strict=True, skipinitialspace=True)
    names: list[str] = []
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if not names:
                names = [cell.strip().lower() for cell in row]
                continue
            if len(row) != len(names):
                raise DamagedFileError(
                    f"{path}, line {rows.line_num} has {len(row)} cells, but the header has {len(names)}. A prompt with a comma in it stands in quotation marks."
                )
            yield f"line {rows.line_num}", {name: cell for name, cell in zip(names, row, strict=True) if cell.strip()}
    except csv.Error as error:
        raise DamagedFileError(f"{path}, line {rows.line_num} is not valid CSV ({error}).") from error


class _RefusedError(Exception):
    """The bytes pass a limit."""


class _Object(dict[str, Any]):
    """An object of a record; notes the keys that are given twice (the parser does not stop for an error in here)."""

    def __init__(self, repeated: list[str]) -> None:
        super().__init__()
        self._repeated = repeated

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self._repeated.append(key)
        super().__setitem__(key, value)


class _CheckedJson:
    """A file for ijson whose bytes are within the limits; halves of surrogate pairs come out as `UNPAIRED`."""

    def __init__(self, handle: io.BufferedReader[Any], top: int) -> None:
        self._handle, self._scan = handle, JsonScan(values=PROMPT_RECORD_VALUES, record=PROMPT_RECORD_BYTES, top=top)

    def read(self, size: int) -> bytes:
        data = self._handle.read(size)
        while b"\\" in data[-_PAIR_BYTES:] and (more := self._handle.read(size)):  # no escape is cut in two
            data += more
            if len(data) > PROMPT_RECORD_BYTES:
                raise _RefusedError(f"one text is longer than {PROMPT_RECORD_BYTES >> 20} MiB")
        try:
            self._scan.feed(data)
        except ValueError as error:
            raise _RefusedError(str(error)) from error
        if _MAYBE_HALF.search(data):
            data = _ESCAPES.sub(lambda found: rb"\uffff" if found[1] else found[0], data)
        return data


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _locate(path: Path, error: Exception) -> str:
    """Line and column of a syntax error where the file is small enough to parse again; else the parser's own words."""
    if os.path.getsize(path) <= EXPLAIN_BYTES:
        try:
            parse_json(path.read_bytes())
        except ValueError as located:
            return str(located)
    what, *context = str(error).strip().splitlines() or [type(error).__name__]
    return f"{what} Near: {' '.join(context[0].split())}" if context else what
