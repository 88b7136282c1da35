"""Are two prompt sets disjoint? Calibrating on evaluation prompts would make the evaluation meaningless.

Two samples are the same prompt when their ids are equal or their captions are, up to white space and case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ptq.errors import PtqError
from ptq.prompts.sample import PromptSet, Sample

LISTED = 5


def caption_digest(text: str) -> str:
    """Hex SHA-256 of a caption with runs of white space made one space and case folded away."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Overlap:
    """One sample of the first set that the second has too, and by what it was recognised."""

    id: str
    by: Literal["id", "caption"]


class Known:
    """The ids and captions of a set, for asking whether it has a sample."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._ids: set[str] = set()
        self._captions: set[str] = set()
        for sample in samples:
            self._ids.add(sample.id)
            self._captions.update((caption_digest(sample.prompt), caption_digest(sample.score_prompt)))

    def match(self, sample: Sample) -> Literal["id", "caption"] | None:
        """By what `sample` is in the set (the id goes first), or None."""
        if sample.id in self._ids:
            return "id"
        digests = {caption_digest(sample.prompt), caption_digest(sample.score_prompt)}
        return "caption" if digests & self._captions else None


def find_overlaps(a: Iterable[Sample], b: Iterable[Sample]) -> list[Overlap]:
    """The samples of `a` that `b` has too, in the order of `a`."""
    known = Known(b)
    return [Overlap(sample.id, by) for sample in a if (by := known.match(sample)) is not None]


def check_disjoint(a: PromptSet, b: PromptSet) -> None:
    """Refuse two prompt sets that share a prompt.

    Raises:
        PtqError: they do; the text says how many and lists the first.
    """
    overlaps = find_overlaps(a.samples, b.samples)
    if not overlaps:
        return
    listed = ", ".join(f"{one.id!r} (same {one.by})" for one in overlaps[:LISTED])
    more = f" and {len(overlaps) - LISTED} more" if len(overlaps) > LISTED else ""
    raise PtqError(
        f"{a.path} and {b.path} share {len(overlaps)} prompts: {listed}{more}. Calibration and evaluation prompts must not overlap; leave them out with --exclude, or use another file."
    )
