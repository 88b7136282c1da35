"""Work units: (dataset, sample id, k), their seeds and their file names.

By default a unit's seed depends on nothing but its name and the base seed: not on order, filter, sharding or resume. That is
what makes two runs paired. Other schemes (`SEED_SCHEMES`) are those of published scores. No torch here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ptq.errors import UsageError
from ptq.prompts.sample import Sample, unit_seed

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")
"""Ids of this form are their own file name. "~" is not among the characters, so no such id equals a shortened one."""

SEED_SCHEMES: Mapping[str, str] = {
    "unit": "the base seed and a hash of the unit's name",
    "vbench": "100000 * i + j for prompt i of the run and sample j, both from 0",
    "same": "the base seed for every unit",
}
"""Name -> what a unit's seed is."""
VBENCH_STRIDE, VBENCH_SAMPLES = 100_000, 5
"""Of scheme vbench: what a prompt's number is multiplied by, and how many samples of a prompt it knows."""

_KEPT_CHARS = 48
_HASH_CHARS = 16


@dataclass(frozen=True)
class Unit:
    """One video to make: repetition `k` of a sample. position: of the sample among those of the run, from 0."""

    sample: Sample
    k: int
    position: int = 0

    @property
    def name(self) -> str:
        """`dataset/sample_id/k`, the unit's name in manifests."""
        return f"{self.sample.dataset}/{self.sample.id}/{self.k}"

    def seed(self, base: int, scheme: str = "unit") -> int:
        """The unit's seed in a run of this base seed and scheme (a key of `SEED_SCHEMES`)."""
        if scheme == "same":
            return base
        if scheme == "vbench":
            return base + VBENCH_STRIDE * self.position + self.k
        return unit_seed(base, self.sample.dataset, self.sample.id, self.k)

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return f"{safe_name(self.sample.id)}-{self.k}"


def safe_name(sample_id: str) -> str:
    """A file name for a sample id: the id itself where it is short and plain, else its start, "~" and 16 hex digits.

    Different ids get different names (up to a collision of 64 bits of SHA-256); at most 80 characters.
    """
    if _PLAIN.fullmatch(sample_id):
        return sample_id
    start = re.sub(r"[^A-Za-z0-9]+", "_", sample_id)[:_KEPT_CHARS].strip("_")
    return f"{start}~{hashlib.sha256(sample_id.encode()).hexdigest()[:_HASH_CHARS]}"


def make_units(samples: Sequence[Sample], samples_per_prompt: int = 1) -> list[Unit]:
    """All units of a run, sample by sample.

    Raises:
        UsageError: no samples, a repeated id, several datasets, or samples_per_prompt below 1.
    """
    if samples_per_prompt < 1:
        raise UsageError(f"--samples-per-prompt must be at least 1, found {samples_per_prompt}.")
    if not samples:
        raise UsageError("There is nothing to generate: the prompt file gave no samples.")
    datasets = sorted({sample.dataset for sample in samples})
    if len(datasets) > 1:
        raise UsageError(
            f"One run holds one dataset, found {', '.join(datasets)}. Start one run for each, with its own --out."
        )
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise UsageError(f"The sample id {sample.id!r} occurs twice; ids must be unique within a dataset.")
        seen.add(sample.id)
    return [Unit(sample, k, position) for position, sample in enumerate(samples) for k in range(samples_per_prompt)]
