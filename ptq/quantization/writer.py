"""Finished blocks go to disk in the background, while the next block is solved."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from ptq.checkpoint.safetensors_file import TensorEntry
from ptq.quantization.workdir import WorkDir


class BlockWriter:
    """Writes the blocks of one expert in their order; a context manager.

    One block at a time waits to be written. What goes wrong is raised by the next `put`, or at the end; a block counts as
    finished only when its file is whole, so a killed run makes at most the last two again.
    """

    def __init__(self, work: WorkDir, expert: str) -> None:
        self._work, self._expert = work, expert
        self._pool = ThreadPoolExecutor(1, "block-writer")
        self._pending: Future[None] | None = None
        self.entries: dict[str, TensorEntry] = {}
        """Tensors of the blocks written so far, as they are on disk; all of them at the end."""

    def put(self, index: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Hand over a finished block, as `WorkDir.save_block` takes it; its tensors are not changed afterwards."""
        self._wait()
        self._pending = self._pool.submit(self._write, index, tensors, info)

    def _write(self, index: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        self._work.save_block(self._expert, index, tensors, info)
        stored = self._work.load_block(self._expert, index)
        assert stored is not None  # it was written a moment ago
        self.entries.update(stored[0])

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()
