"""Denoiser-output error of an expert in which each block is either the original or its quantized counterpart.

One measurement serves three questions: how good is a packed checkpoint on held-out records (every block quantized), how
sensitive is each block (one block quantized), and what would protecting a block gain (one block original). Records are
weighted by d_sigma^2, because an error in the predicted velocity enters the final latent times d_sigma.

Errors are squared norms relative to the squared norm of the original's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptq import ui
from ptq.calibration.records import CalibrationSet
from ptq.errors import UsageError
from ptq.quantization.block import ReplayRecord, forward_stream, record_weights
from ptq.quantization.streams import Stream
from ptq.wan.replay import ExpertReplay

KEEP_BLOCKS_BYTES = 2 * 2**30
"""All blocks of both models stay in memory where they fit under this; otherwise they are read again for every pass."""


class HybridExpert:
    """An original expert and its packed version over the same records.

    Args:
        original, packed: replays of both; the same structure.
        calibration: records; those of `expert` are used.
        weighting: d_sigma2 or uniform.

    Raises:
        UsageError: no records of this expert.
    """

    def __init__(
        self,
        expert: str,
        original: ExpertReplay,
        packed: ExpertReplay,
        calibration: CalibrationSet,
        weighting: str = "d_sigma2",
    ) -> None:
        self.expert, self._replays, self._calibration = expert, (original, packed), calibration
        records = calibration.of_expert(expert)
        if not records:
            raise UsageError(f"{calibration.directory} has no records of {expert}; the error cannot be measured on it.")
        self._calls = {r.record: calibration.load(r) for r in records}
        weights = record_weights(records, weighting)
        self._items = [
            ReplayRecord(record, weight, lambda name=record.record: self._context(name))
            for record, weight in zip(records, weights, strict=True)
        ]
        size = sum(entry.nbytes for replay in self._replays for entry in replay.shards.entries.values())
        self._blocks: dict[tuple[int, int], nn.Module] | None = {} if size * 4 <= KEEP_BLOCKS_BYTES else None
        self._reference: dict[str, Tensor] = {}
        base = self.start()
        for index in range(self.num_blocks):
            self.advance(base, index, quantized=False)
        self._reference = {item.record.record: self._output(base, item) for item in self._items}
        self.signal = sum(i.weight * float(self._reference[i.record.record].square().sum()) for i in self._items)

    @property
    def num_blocks(self) -> int:
        """Blocks of the expert."""
        return self._replays[0].num_blocks

    def start(self) -> Stream:
        """A stream with the inputs of block 0."""
        stream = Stream()
        for item in self._items:
            stream[item.record.record] = self._head(item.record.record)
        return stream

    def advance(self, stream: Stream, index: int, *, quantized: bool) -> None:
        """Move a stream through block `index`, in place."""
        forward_stream(self._block(index, quantized), self._items, stream, stream, self._replays[0].device)

    def error(self, quantized: Sequence[bool]) -> float:
        """Error of the expert with block i quantized where `quantized[i]`."""
        stream = self.start()
        for index, flag in enumerate(quantized):
            self.advance(stream, index, quantized=flag)
        return self._error(stream)

    def flip_errors(
        self, quantized: Sequence[bool], candidates: Sequence[int], bar: ui.Progress | None = None
    ) -> list[float]:
        """Error after flipping each candidate block of an assignment alone; the common prefix is computed once.

        Args:
            quantized: the assignment, one flag a block.
            candidates: ascending block indices to flip.
            bar: advanced by one for each candidate.
        """
        prefix, done, errors = self.start(), 0, []
        for candidate in candidates:
            for index in range(done, candidate):
                self.advance(prefix, index, quantized=quantized[index])
            done = candidate
            branch = self._copy(prefix)
            self.advance(branch, candidate, quantized=not quantized[candidate])
            for index in range(candidate + 1, self.num_blocks):
                self.advance(branch, index, quantized=quantized[index])
            errors.append(self._error(branch))
            if bar is not None:
                bar.advance()
        return errors

    def _copy(self, stream: Stream) -> Stream:
        copy = Stream()
        for item in self._items:
            copy[item.record.record] = stream[item.record.record]
        return copy

    def _block(self, index: int, quantized: bool) -> nn.Module:
        key = (int(quantized), index)
        if self._blocks is None:
            return self._replays[key[0]].load_block(index)
        if key not in self._blocks:
            self._blocks[key] = self._replays[key[0]].load_block(index)
        return self._blocks[key]

    def _arguments(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        call = self._calls[name]
        return call.hidden_states, call.timestep, call.encoder_hidden_states

    def _head(self, name: str) -> Tensor:
        return self._replays[0].head(name, *self._arguments(name))[0]

    def _context(self, name: str):
        return self._replays[0].context(name, *self._arguments(name))

    def _output(self, stream: Stream, item: ReplayRecord) -> Tensor:
        name = item.record.record
        return self._replays[0].tail(stream[name], *self._arguments(name)).double()

    @torch.no_grad()
    def _error(self, stream: Stream) -> float:
        total = 0.0
        for item in self._items:
            difference = self._output(stream, item) - self._reference[item.record.record]
            total += item.weight * float(difference.square().sum())
        return total / self.signal
