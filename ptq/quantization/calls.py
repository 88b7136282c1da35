"""The recorded calls of one expert, ready to be replayed: weights, initial streams, contexts, outputs and their error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ptq.errors import PtqError
from ptq.quantization.placing import Place
from ptq.quantization.streams import Stream
from ptq.store.calibration import CalibrationSet, DenoiserCall
from ptq.store.records import Record
from ptq.wan.replay import BlockContext, ExpertReplay


@dataclass(frozen=True)
class ReplayRecord:
    """A record during replay, and how to get its context.

    Attributes:
        importance: in errors of the denoiser's output, d_sigma^2; mean 1 over the expert. In statistics all weigh the same.
    """

    record: Record
    importance: float
    context: Callable[[], BlockContext]


def importances(records: Sequence[Record]) -> list[float]:
    """d_sigma^2 of each record, mean 1: an error in the predicted velocity enters the latent times d_sigma.

    It counts what an error adds to the final latent directly; what later steps make of it is not in it.
    """
    raw = [record.d_sigma**2 for record in records]
    total = sum(raw)
    return [weight * len(raw) / total for weight in raw] if total else [1.0] * len(raw)


def spread(records: Sequence[Record], limit: int | None) -> list[Record]:
    """At most `limit` records, evenly spaced in order of sigma, the first and the last step among them; in file order."""
    if limit is None or limit >= len(records):
        return list(records)
    ordered = sorted(range(len(records)), key=lambda i: records[i].sigma)
    last = len(ordered) - 1
    picked = {ordered[round(i * last / max(1, limit - 1))] for i in range(limit)} if limit > 1 else {ordered[last // 2]}
    return [record for i, record in enumerate(records) if i in picked]


class ExpertCalls:
    """The calls of one expert in a record set.

    Args:
        expert: its name.
        replay: runs head and tail (the original's and the packed model's are the same).
        calibration: the record set.
        limit: use at most this many records, see `spread`.

    Raises:
        PtqError: the set has no records of this expert.
    """

    def __init__(
        self, expert: str, replay: ExpertReplay, calibration: CalibrationSet, limit: int | None = None
    ) -> None:
        self._replay, self._calibration = replay, calibration
        records = spread(calibration.of_expert(expert), limit)
        if not records:
            raise PtqError(
                f"{calibration.directory} has no records of {expert}. Record more steps (--steps, --records-per-prompt) so that every expert is called."
            )
        self.items = [
            ReplayRecord(record, importance, self._context_of(record))
            for record, importance in zip(records, importances(records), strict=True)
        ]

    def start(self, place: Place = "memory", scratch: Path | None = None) -> Stream:
        """A stream with the inputs of block 0, see `Stream`."""
        stream = Stream(place, scratch)
        for item in self.items:
            stream[item.record.record] = self._replay.head(self._name(item.record), self._call(item.record))[0]
        return stream

    def copy(self, stream: Stream) -> Stream:
        """An independent copy of a stream, in memory."""
        copy = Stream()
        for item in self.items:
            copy[item.record.record] = stream[item.record.record]
        return copy

    def output(self, stream: Stream, item: ReplayRecord) -> Tensor:
        """The denoiser's output float64 [1, C, T, H, W] for a record whose hidden states have passed every block."""
        return self._replay.tail(stream[item.record.record], self._call(item.record)).double()

    @torch.no_grad()
    def output_error(self, reference: Stream, candidate: Stream) -> float:
        """d_sigma^2-weighted squared output error of `candidate` relative to the squared output of `reference`."""
        error = signal = 0.0
        for item in self.items:
            original = self.output(reference, item)
            error += item.importance * float((self.output(candidate, item) - original).square().sum())
            signal += item.importance * float(original.square().sum())
        return error / signal if signal else 0.0

    def _name(self, record: Record) -> str:
        """A name for the replay's cache: records of two sets have the same names."""
        return f"{self._calibration.digest}/{record.record}"

    def _call(self, record: Record) -> DenoiserCall:
        return self._calibration.load(record)

    def _context_of(self, record: Record) -> Callable[[], BlockContext]:
        return lambda: self._replay.context(self._name(record), lambda: self._call(record))
