"""Hidden states of every record between two blocks, in memory or in a memory-mapped scratch file.

A stream is as large as records x tokens x width. Where it does not fit under the limit it lives in a file that is deleted
with the object; the operating system then pages it, and the numbers are the same.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor


class Stream:
    """One tensor [1, tokens, D] for each record name.

    Args:
        scratch: folder for the memory-mapped file, or None to stay in memory.
    """

    def __init__(self, scratch: Path | None = None) -> None:
        self._scratch = scratch
        self._tensors: dict[str, Tensor] = {}

    def __getitem__(self, record: str) -> Tensor:
        return self._tensors[record]

    def __setitem__(self, record: str, hidden: Tensor) -> None:
        existing = self._tensors.get(record)
        if existing is None:
            self._tensors[record] = self._allocate(record, hidden)
        else:
            existing.copy_(hidden)

    def _allocate(self, record: str, hidden: Tensor) -> Tensor:
        if self._scratch is None:
            return hidden.to("cpu", copy=True)
        self._scratch.mkdir(parents=True, exist_ok=True)
        path = self._scratch / f"{record}-{id(self)}.stream"
        mapped = torch.from_file(str(path), shared=True, size=math.prod(hidden.shape), dtype=hidden.dtype)
        path.unlink()  # the mapping keeps the data; nothing is left behind when the process dies
        return mapped.reshape(hidden.shape).copy_(hidden)
