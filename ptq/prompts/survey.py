"""What a prompt file holds, in numbers and a few examples, without keeping its text.

Memory stays small whatever the file's size: a length and a fingerprint per prompt.
"""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ptq.prompts.images import RESIZE_POLICY
from ptq.prompts.reader import PromptScan
from ptq.prompts.sample import Sample

PREVIEW = 5
MISSING_LISTED = 5


@dataclass(frozen=True)
class Survey:
    """Counts, caption lengths in characters, media found and missing, and the first samples of a prompt file.

    media: number of samples for each kind (`image`, `video`, `crop`; `none` for text only).
    missing: how many of them were not found; missing_first: the first, as {id, path}.
    """

    path: str
    format: str
    dataset: str
    sha256: str
    records: int
    samples: int
    excluded: int
    caption_chars: dict[str, float] | None
    media: dict[str, int]
    missing: int
    missing_first: list[dict[str, str]]
    preview: list[dict[str, Any]]
    resize_policy: str = RESIZE_POLICY

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def survey(scan: PromptScan) -> Survey:
    """Run through a prompt file once.

    Raises:
        DamagedFileError: as `PromptScan`.
    """
    lengths, kinds, missing = array("L"), Counter[str](), 0
    missing_first: list[dict[str, str]] = []
    preview: list[dict[str, Any]] = []
    for sample in scan:
        lengths.append(len(sample.prompt))
        media = sample.media
        kinds["none" if media is None else media.kind] += 1
        if media is not None and media.resolved is None:
            missing += 1
            if len(missing_first) < MISSING_LISTED:
                missing_first.append({"id": sample.id, "path": media.path})
        if len(preview) < PREVIEW:
            preview.append(_example(sample))
    spread: dict[str, float] | None = None
    if lengths:
        spread = {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)}
    return Survey(
        path=str(scan.path),
        format=scan.format,
        dataset=scan.dataset,
        sha256=scan.sha256,
        records=scan.records,
        samples=len(lengths),
        excluded=scan.excluded,
        caption_chars=spread,
        media=dict(kinds),
        missing=missing,
        missing_first=missing_first,
        preview=preview,
    )


def _example(sample: Sample) -> dict[str, Any]:
    media = sample.media
    found = media.resolved if media is not None else None
    return {
        "id": sample.id,
        "prompt": sample.prompt,
        "media": None if media is None else media.path,
        "resolved": None if found is None else str(found),
        **sample.extra,
    }
