"""Hidden states of every record between two blocks: on the GPU, in page-locked or ordinary memory, or in a memory-mapped file.

A stream is as large as records x tokens x width. Whatever its place, the numbers are the same. `visit` begins to move the next
record's states while the current one's are used: a copy to the GPU beside its work, or pages read from the disk.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ptq.quantization.placing import Place


class Stream:
    """One tensor [R, tokens, D] for each name of a record, or of R records that are replayed together.

    Args:
        place: where the tensors are.
        scratch: folder for the memory-mapped files of the place "disk"; they are deleted with the object.
    """

    def __init__(self, place: Place = "memory", scratch: Path | None = None) -> None:
        self._place, self._scratch = place, scratch
        self._tensors: dict[str, Tensor] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._side: torch.cuda.Stream | None = None

    def __getitem__(self, record: str) -> Tensor:
        return self._tensors[record]

    def __setitem__(self, record: str, hidden: Tensor) -> None:
        existing = self._tensors.get(record)
        if existing is None:
            self._tensors[record] = self._allocate(record, hidden)
        else:
            existing.copy_(hidden)

    def visit(self, records: Iterable[str], device: torch.device) -> Iterator[Tensor]:
        """The hidden states of these records, one after the other, on `device`. Those visited already may be set."""
        ahead: list[Callable[[], Tensor]] = []
        for record in records:
            ahead.append(self._fetch(record, device))
            if len(ahead) > 1:
                yield ahead.pop(0)()
        yield from (arrive() for arrive in ahead)

    def _fetch(self, record: str, device: torch.device) -> Callable[[], Tensor]:
        """Begin to bring a record's states; the result waits until they are there."""
        hidden = self._tensors[record]
        if self._place == "disk":
            self._maps[record].madvise(mmap.MADV_WILLNEED)
        if self._place != "pinned":
            return lambda: hidden.to(device)
        side = self._side = self._side or torch.cuda.Stream(device)
        with torch.cuda.stream(side):
            moved = hidden.to(device, non_blocking=True)

        def arrive() -> Tensor:
            current = torch.cuda.current_stream(device)
            current.wait_stream(side)
            moved.record_stream(current)
            return moved

        return arrive

    def _allocate(self, record: str, hidden: Tensor) -> Tensor:
        if self._place == "gpu":
            return hidden.clone()
        if self._place == "pinned":
            return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(hidden)
        if self._place == "memory":
            return hidden.to("cpu", copy=True)
        assert self._scratch is not None
        self._scratch.mkdir(parents=True, exist_ok=True)
        path = self._scratch / f"{record}-{id(self)}.stream"
        with path.open("w+b") as file:
            path.unlink()  # the mapping keeps the data; nothing is left behind when the process dies
            file.truncate(math.prod(hidden.shape) * hidden.dtype.itemsize)
            mapped = self._maps[record] = mmap.mmap(file.fileno(), 0)
        return torch.frombuffer(mapped, dtype=hidden.dtype).reshape(hidden.shape).copy_(hidden)
