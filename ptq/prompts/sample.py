"""What a prompt file holds once read: samples, the media they start from, and the set they form.

Plain data, the same for every file format; readers fill it, calibration and generation consume it. No file access here.
A sample is recognised by its id, or by its caption up to white space and case; its seed depends on its names alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

MediaKind = Literal["image", "video", "crop"]


@dataclass(frozen=True, slots=True)
class MediaRef:
    """The picture an image-to-video sample starts from.

    kind: `image` is a picture file, `video` one frame of a clip, `crop` a rectangle of one frame of a clip.
    path: exactly as the prompt file spells it.
    frame: index of the frame in the clip, counted from 0 (the container's frames, not a file's `num_frames`).
    crop: [x0, x1, y0, y1] in pixels of the clip, end-exclusive; only with kind `crop`.
    resolved: where the file is on this machine; None when it was not found.
    """

    kind: MediaKind
    path: str
    frame: int = 0
    crop: tuple[int, int, int, int] | None = None
    resolved: Path | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt. (`dataset`, `id`) identifies it and, with the repetition k, decides its seed.

    prompt: the text the text encoder gets.
    score_prompt: the text used for naming and scoring; differs from `prompt` only where the file says so.
    media: None for text-to-video samples.
    extra: a few values of the format (VBench dimensions, number of reference images, ...), JSON-like and small.
    """

    dataset: str
    id: str
    prompt: str
    score_prompt: str
    media: MediaRef | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class PromptSet:
    """A prompt file as read.

    format: one of `ptq.prompts.formats.FORMAT_NAMES`. sha256: hex digest of the file's bytes.
    dataset: stem of the file's name, the first part of every work unit.
    records: entries read from the file; more than `len(samples)` where entries were merged (VBench lists a prompt once
        for each group of dimensions) or excluded. excluded: samples left out because the exclude file has them.
    """

    path: Path
    format: str
    sha256: str
    dataset: str
    samples: list[Sample]
    records: int
    excluded: int


def caption_digest(text: str) -> str:
    """Hex SHA-256 of a caption with runs of white space made one space and case folded away."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode("utf-8")).hexdigest()


def unit_seed(base: int, dataset: str, sample_id: str, k: int) -> int:
    """The seed of repetition `k` of a sample: base + first four bytes (big-endian) of blake2b("dataset|id|k").

    It depends on what is generated, never on order, filter, sharding or resume.
    """
    key = f"{dataset}|{sample_id}|{k}".encode()
    return base + int.from_bytes(hashlib.blake2b(key).digest()[:4], "big")
