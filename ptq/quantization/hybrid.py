"""Denoiser-output error of an expert in which each block is either the original or its quantized counterpart.

One measurement serves three questions: how good is a packed checkpoint on held-out records (every block quantized), how
sensitive is each block (one block quantized), and what would protecting a block gain (one block original). Records are
weighted by d_sigma^2, because an error in the predicted velocity enters the final latent times d_sigma.

Errors are squared norms relative to the squared norm of the original's output.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ptq import ui
from ptq.quantization.block import forward_stream
from ptq.quantization.calls import ExpertCalls
from ptq.quantization.streams import Stream
from ptq.store.calibration import CalibrationSet
from ptq.wan.replay import ExpertReplay

KEEP_BLOCKS_BYTES = 2 * 2**30
"""All blocks of both models stay in memory where they fit under this; otherwise they are read again for every pass."""


class HybridExpert:
    """An original expert and its packed version over the same records.

    Args:
        original, packed: replays of both; the same structure.
        calibration: records; those of `expert` are used.

    Raises:
        PtqError: no records of this expert.
    """

    def __init__(self, expert: str, original: ExpertReplay, packed: ExpertReplay, calibration: CalibrationSet) -> None:
        self.expert, self._replays = expert, (original, packed)
        self._calls = ExpertCalls(expert, original, calibration)
        size = sum(entry.nbytes for replay in self._replays for entry in replay.shards.entries.values())
        self._blocks: dict[tuple[int, int], nn.Module] | None = {} if size * 4 <= KEEP_BLOCKS_BYTES else None
        self._reference = self._calls.start()
        for index in range(self.num_blocks):
            self._advance(self._reference, index, quantized=False)
        self.signal = self._calls.output_energy(self._reference)

    @property
    def num_blocks(self) -> int:
        """Blocks of the expert."""
        return self._replays[0].num_blocks

    def _advance(self, stream: Stream, index: int, *, quantized: bool) -> None:
        """Move a stream through block `index`, in place."""
        forward_stream(self._block(index, quantized), self._calls.batches, stream, stream, self._replays[0].device)

    def error(self, quantized: Sequence[bool]) -> float:
        """Error of the expert with block i quantized where `quantized[i]`."""
        stream = self._calls.start()
        for index, flag in enumerate(quantized):
            self._advance(stream, index, quantized=flag)
        return self._calls.output_error(self._reference, stream)

    def flip_errors(
        self, quantized: Sequence[bool], candidates: Sequence[int], bar: ui.Progress | None = None
    ) -> list[float]:
        """Error after flipping each candidate block of an assignment alone; the common prefix is computed once.

        Args:
            quantized: the assignment, one flag a block.
            candidates: ascending block indices to flip.
            bar: advanced by one for each candidate.
        """
        prefix, done, errors = self._calls.start(), 0, []
        for candidate in candidates:
            for index in range(done, candidate):
                self._advance(prefix, index, quantized=quantized[index])
            done = candidate
            branch = self._calls.copy(prefix)
            self._advance(branch, candidate, quantized=not quantized[candidate])
            for index in range(candidate + 1, self.num_blocks):
                self._advance(branch, index, quantized=quantized[index])
            errors.append(self._calls.output_error(self._reference, branch))
            if bar is not None:
                bar.advance()
        return errors

    def _block(self, index: int, quantized: bool) -> nn.Module:
        key = (int(quantized), index)
        if self._blocks is None:
            return self._replays[key[0]].load_block(index)
        if key not in self._blocks:
            self._blocks[key] = self._replays[key[0]].load_block(index)
        return self._blocks[key]
