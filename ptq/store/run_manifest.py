"""The manifests of a generation run: one append-only JSONL file for each shard, read by all, written by its shard only.

The last line of a unit wins within one file; over several files a finished line wins over a failed one, then the later
one. `refresh` reads only what was appended since the last call, so that a rank can look at the others' progress before
each unit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from ptq import ui
from ptq.errors import DamagedFileError
from ptq.store.files import append_jsonl, parse_line
from ptq.store.schema import Count, Number, Positive, Schema, Text, problems
from ptq.store.sharding import Shard

PATTERN = "manifest-*.jsonl"
"""Finds the manifests of a run directory."""
FILE_KEYS = ("video", "final_latents", "saved_frames")
"""Fields of a line that name files of the run; "<name>_sha256" has the digest."""
_NAME = re.compile(r"manifest-(\d+)of(\d+)\.jsonl")
_DONE_KEYS = (
    *("sample_id", "k", "prompt", "score_prompt", "seed", "latent_sha256"),
    *("width", "height", "frames", "video", "video_sha256"),
)


class ImageSource(Schema):
    """How the image of a unit was made from its media file (`ptq.prompts.MediaRef`)."""

    kind: Literal["image", "video", "crop"] = "image"
    frame: Count = 0
    crop: tuple[Count, Count, Count, Count] | None = Field(default=None, strict=False)
    resize: str | None = None


class ManifestLine(Schema):
    """One attempt at a unit. Paths are relative to the run directory.

    image_sha256: over the fitted pixels, uint8 [height, width, 3]. latent_sha256: of the initial noise. seconds: of this
    attempt. error: why it failed.
    """

    unit: str
    dataset: str | None = None
    sample_id: str | None = None
    k: Count | None = None
    prompt: Text | None = None
    score_prompt: Text | None = None
    image: str | None = None
    image_sha256: str | None = None
    seed: Count | None = None
    latent_sha256: str | None = None
    width: Positive | None = None
    height: Positive | None = None
    frames: Positive | None = None
    fps: Number | None = None
    steps: Positive | None = None
    flow_shift: Number | None = None
    guidance_scale: Number | None = None
    guidance_scale_2: Number | None = None
    checkpoint_digest: str | None = None
    device: str | None = None
    seconds: Number | None = None
    peak_memory_bytes: Count | None = None
    video: str | None = None
    video_sha256: str | None = None
    final_latents: str | None = None
    final_latents_sha256: str | None = None
    saved_frames: str | None = None
    image_source: ImageSource | None = None
    saved_frames_sha256: str | None = None
    finished: str | None = None
    status: Literal["done", "failed"]
    error: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> ManifestLine:
        missing = [key for key in _DONE_KEYS if getattr(self, key) is None]
        if self.is_done and missing:
            raise ValueError(f"a finished unit without {', '.join(missing)}")
        return self

    @property
    def is_done(self) -> bool:
        """The unit's files are there."""
        return self.status == "done"


def manifest_name(shard: Shard) -> str:
    """File name of a shard's manifest."""
    return f"manifest-{shard.tag}.jsonl"


class Manifests:
    """All manifests of a run directory. `shard` is the one this process writes; None for readers.

    by_shard: tag of a shard (`0of3`) -> unit -> its last line.
    """

    def __init__(self, root: Path, shard: Shard | None = None) -> None:
        self._root, self._shard = root, shard
        self._read: dict[Path, tuple[int, int]] = {}  # path -> bytes and lines already read
        self.by_shard: dict[str, dict[str, ManifestLine]] = {}

    def refresh(self) -> None:
        """Read the lines that were appended since the last call. A line without its newline waits for the next call.

        Raises:
            DamagedFileError: a whole line is no `ManifestLine`, or names a file elsewhere.
        """
        for path in sorted(self._root.glob(PATTERN)):
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
                    lines[line.unit] = line
            self._read[path] = (offset + len(whole), number)

    def _parse(self, path: Path, number: int, text: bytes) -> ManifestLine:
        try:
            line = ManifestLine.model_validate(parse_line(text))
            for key in FILE_KEYS:
                name = getattr(line, key)
                if name and not (self._root / name).resolve().is_relative_to(self._root.resolve()):
                    raise ValueError(f"{key} lies outside the run directory")
        except ValueError as error:
            found = problems(error) if isinstance(error, ValidationError) else str(error)
            raise DamagedFileError(
                f"{path}, line {number} is damaged ({found}). Nothing was changed. Delete that line and run `ptq generate` again: its unit is then made again, all others are kept."
            ) from error
        return line

    def get(self, unit: str) -> ManifestLine | None:
        """The line that counts for a unit, or None."""
        found = [lines[unit] for lines in self.by_shard.values() if unit in lines]
        return max(found, key=lambda line: (line.is_done, line.finished or ""), default=None)

    def __iter__(self) -> Iterator[ManifestLine]:
        """The line that counts of every unit."""
        for name in dict.fromkeys(name for lines in self.by_shard.values() for name in lines):
            line = self.get(name)
            if line is not None:
                yield line

    def append(self, line: ManifestLine) -> None:
        """Add a line to this shard's manifest and flush it to disk.

        Raises:
            PtqError: the disk is full or not writable.
        """
        append_jsonl(self._own_path(), line.as_json())

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


def read_lines(directory: Path) -> dict[str, ManifestLine]:
    """Unit -> the line that counts for it, of every unit in the manifests of a run.

    Raises:
        DamagedFileError: as `Manifests.refresh`.
    """
    manifests = Manifests(directory)
    manifests.refresh()
    return {line.unit: line for line in manifests}


def finished_lines(directory: Path) -> dict[str, ManifestLine]:
    """As `read_lines`, of the finished units only."""
    return {unit: line for unit, line in read_lines(directory).items() if line.is_done}
