"""The recorded calls of one expert, ready to be replayed: weights, initial streams, contexts, outputs and their error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq.errors import PtqError
from ptq.quantization.placing import Place
from ptq.quantization.streams import Stream
from ptq.store.calibration import CalibrationSet, DenoiserCall
from ptq.store.records import Record
from ptq.wan.block import video_tokens
from ptq.wan.estimates import CallSize
from ptq.wan.replay import BlockContext, ExpertReplay

BATCH_TOKENS = 2048
"""Tokens of video, text and image that run through a block together, at most: records with fewer than half of them are
replayed several at a time, because short forwards cost what starting their operations costs."""


@dataclass(frozen=True)
class ReplayBatch:
    """Records of one size during replay, and how to get their context.

    Attributes:
        name: of the batch in streams.
        records: R of them.
        size: of each of them.
        importances: in errors of the denoiser's output, d_sigma^2; mean 1 over the expert. In statistics all weigh the same.
        context: of all of them, their order in the first dimension.
    """

    name: str
    records: tuple[Record, ...]
    size: CallSize
    importances: tuple[float, ...]
    context: Callable[[], BlockContext]


@dataclass(frozen=True)
class Probe:
    """One record of a batch, to be run on its own or beside records of other batches."""

    batch: ReplayBatch
    index: int

    @property
    def name(self) -> str:
        """Of the record."""
        return self.batch.records[self.index].record

    def of(self, stream: Stream) -> Tensor:
        """Its hidden states [1, tokens, D] in a stream."""
        return stream[self.batch.name][self.index : self.index + 1]

    def context(self) -> BlockContext:
        """Its context alone."""
        whole, own = self.batch.context(), slice(self.index, self.index + 1)
        return BlockContext(whole.context[own], whole.temb[own], whole.rotary)


def record_size(calibration: CalibrationSet, record: Record, config: Mapping[str, Any]) -> CallSize:
    """Size of a recorded call of an expert with this config.json."""
    channels, times, rows, columns = calibration.shape(record)
    latent = (channels, times, rows, columns)
    text, image = calibration.tokens(record)
    return CallSize(video_tokens(config, latent), text, latent, image)


def records_together(size: CallSize) -> int:
    """How many records of this size are replayed at a time, at most."""
    return max(1, BATCH_TOKENS // (size.tokens + size.text + size.image))


def neighbours(sizes: Sequence[CallSize]) -> list[slice]:
    """Parts of a sequence of records that are replayed together, from their sizes."""
    parts, start = [], 0
    for size, alike in itertools.groupby(sizes):
        stop, count = start + len(list(alike)), records_together(size)
        parts += [slice(first, min(first + count, stop)) for first in range(start, stop, count)]
        start = stop
    return parts


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
        self.count = len(records)
        """Of the records that are replayed."""
        weights = importances(records)
        sizes = [record_size(calibration, record, replay.config) for record in records]
        self.batches = [self._batch(records[part], sizes[part.start], weights[part]) for part in neighbours(sizes)]
        """The records in their order, neighbours of one size together."""

    def _batch(self, records: Sequence[Record], size: CallSize, weights: Sequence[float]) -> ReplayBatch:
        return ReplayBatch(
            records[0].record,
            tuple(records),
            size,
            tuple(weights),
            lambda: self._replay.context(self._cached(records), lambda: self._load(records)),
        )

    def start(self, place: Place = "memory", scratch: Path | None = None) -> Stream:
        """A stream with the inputs of block 0, see `Stream`."""
        stream = Stream(place, scratch)
        for batch in self.batches:
            stream[batch.name] = self._replay.head(self._cached(batch.records), *self._load(batch.records))[0]
        return stream

    def copy(self, stream: Stream, place: Place = "memory", scratch: Path | None = None) -> Stream:
        """An independent copy of a stream, see `Stream`."""
        copy = Stream(place, scratch)
        for batch in self.batches:
            copy[batch.name] = stream[batch.name]
        return copy

    @torch.no_grad()
    def output_energy(self, reference: Stream) -> float:
        """Squared output of the denoiser for hidden states that have passed every block, weighted by d_sigma^2."""
        return sum(self._energy(self._output(reference, batch), batch) for batch in self.batches)

    @torch.no_grad()
    def output_error(self, reference: Stream, candidate: Stream) -> float:
        """d_sigma^2-weighted squared output error of `candidate` relative to the squared output of `reference`."""
        error = signal = 0.0
        for batch in self.batches:
            original = self._output(reference, batch)
            error += self._energy(self._output(candidate, batch) - original, batch)
            signal += self._energy(original, batch)
        return error / signal if signal else 0.0

    def _output(self, stream: Stream, batch: ReplayBatch) -> Tensor:
        """float64 [R, C, T, H, W]."""
        hidden, timesteps, texts, images = zip(*self._load(batch.records), strict=True)
        image = None if images[0] is None else torch.cat(images)
        call = DenoiserCall(torch.cat(hidden), torch.cat(timesteps), torch.cat(texts), image)
        return self._replay.tail(stream[batch.name], call).double()

    def _energy(self, output: Tensor, batch: ReplayBatch) -> float:
        squares = output.square().sum((1, 2, 3, 4)).tolist()
        return sum(weight * square for weight, square in zip(batch.importances, squares, strict=True))

    def _load(self, records: Sequence[Record]) -> list[DenoiserCall]:
        return [self._calibration.load(record) for record in records]

    def _cached(self, records: Sequence[Record]) -> str:
        """A name for the replay's cache: records of two sets have the same names."""
        return "/".join((self._calibration.digest, *(record.record for record in records)))
