"""The manifests of a run: one append-only JSONL file for each shard, read by all, written by its shard only.

The last line of a unit wins within one file; over several files a finished line wins over a failed one. `refresh` reads
only what was appended since the last call, so that a rank can look at the others' progress before each unit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import append_jsonl, free_space_hint
from ptq.store.sharding import Shard

Line = dict[str, Any]

_NAME = re.compile(r"manifest-(\d+)of(\d+)\.jsonl")
#: Keys of a line that name files of the run.
FILE_KEYS = ("video", "final_latents", "saved_frames")


def manifest_name(shard: Shard) -> str:
    """File name of a shard's manifest."""
    return f"manifest-{shard.tag}.jsonl"


class Manifests:
    """All manifests of a run directory. `shard` is the one this process writes; None for readers."""

    def __init__(self, root: Path, shard: Shard | None = None) -> None:
        self._root, self._shard = root, shard
        self._read: dict[Path, tuple[int, int]] = {}  # path -> bytes and lines already read
        self.by_shard: dict[str, dict[str, Line]] = {}

    def refresh(self) -> None:
        """Read the lines that were appended since the last call. A line without its newline waits for the next call.

        Raises:
            DamagedFileError: a whole line is not a JSON object with `unit` and `status`, or names a file elsewhere.
        """
        for path in sorted(self._root.glob("manifest-*.jsonl")):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            lines = self.by_shard.setdefault(f"{match[1]}of{match[2]}", {})
            offset, number = self._read.get(path, (0, 0))
            with open(path, "rb") as handle:
                handle.seek(offset)
                data = handle.read()
            whole = data[: data.rfind(b"\n") + 1]
            for text in whole.splitlines():
                number += 1
                if text.strip():
                    line = self._parse(path, number, text)
                    lines[line["unit"]] = line
            self._read[path] = (offset + len(whole), number)

    def _parse(self, path: Path, number: int, text: bytes) -> Line:
        try:
            line = json.loads(text)
            if not isinstance(line["unit"], str) or line["status"] not in ("done", "failed"):
                raise ValueError("no unit or status")
            for key in FILE_KEYS:
                if line.get(key) and not (self._root / line[key]).resolve().is_relative_to(self._root.resolve()):
                    raise ValueError(f"{key} lies outside the run directory")
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(
                f"{path}, line {number} is damaged ({error}). Nothing was changed. Delete that line and run the same command again: its unit is then made again, all others are kept."
            ) from error
        return line

    def get(self, unit: str) -> Line | None:
        """The line that counts for a unit, or None."""
        failed = None
        for lines in self.by_shard.values():
            line = lines.get(unit)
            if line is not None and line["status"] == "done":
                return line
            failed = line or failed
        return failed

    def __iter__(self) -> Iterator[Line]:
        """The line that counts of every unit."""
        for name in dict.fromkeys(name for lines in self.by_shard.values() for name in lines):
            line = self.get(name)
            if line is not None:
                yield line

    def append(self, line: Line) -> None:
        """Add a line to this shard's manifest and flush it to disk.

        Raises:
            PtqError: the disk is full or not writable.
        """
        path = self._own_path()
        try:
            append_jsonl(path, line)
        except OSError as error:
            raise PtqError(
                f"Could not write {path}: {error.strerror or error}. {free_space_hint(self._root)}"
            ) from error

    def drop_torn_line(self) -> None:
        """Cut off a last line without newline: its writer was killed (the shard lock says that nobody writes now)."""
        path = self._own_path()
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
            ui.info(
                f"{path.name}: dropped an unfinished last line of {len(data) - whole} bytes; its unit is made again."
            )

    def _own_path(self) -> Path:
        if self._shard is None:
            raise ValueError("these manifests were opened for reading")
        return self._root / manifest_name(self._shard)
