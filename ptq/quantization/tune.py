"""Tuning the codes of a block after they were solved: all its Linears together, on what the block returns.

GPTQ rounds the Linears of one input for that input alone. Here the latent weights behind the codes move by gradient steps so that the
quantized block, on the original model's hidden states, returns what the original block returns (Adam, arXiv 1412.6980, with a falling
cosine). With the defaults they move by a sixth of a step of their grid at most: what changes are the codes of weights near a threshold. Whether that
generalises is measured: some prompts are kept away, and a block whose error on these does not fall keeps the codes it had.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq.checkpoint.manifest import TuningEntry
from ptq.config.tuning import TuneSettings
from ptq.errors import UsageError
from ptq.quantization.block import quantized_layers, replaced
from ptq.quantization.calls import Probe, ReplayBatch, records_together
from ptq.quantization.latent import LatentLinear, SharedInput
from ptq.quantization.placing import Place
from ptq.quantization.shared_inputs import InputGroup
from ptq.quantization.streams import Stream
from ptq.scheme import Scheme
from ptq.solvers.solve import LayerSolution
from ptq.store.records import Record
from ptq.wan.estimates import CallSize
from ptq.wan.replay import BlockContext, run_block

HELD_OUT = 8
"""One of so many prompts is kept away from tuning, at least one."""
EPSILON = 1e-12
"""Of Adam: far below the gradients of a sum of squares."""


def split(records: Sequence[Record], prompts: int | None) -> tuple[list[Record], list[Record]]:
    """Records of one expert -> those that are tuned on, and those that decide. No prompt is on both sides.

    Args:
        prompts: at most so many take part, the first ones; None: all.

    Raises:
        UsageError: they are of one prompt.
    """
    taking_part = list(dict.fromkeys(record.sample_id for record in records))[:prompts]
    if len(taking_part) < 2:
        raise UsageError(
            f"solver.tune holds out the records of one of {HELD_OUT} prompts, at least one, to see whether tuning helps, and {records[0].expert} has records of {len(taking_part)} prompt alone. Record more prompts with `ptq calibrate --num-prompts`, or set solver.tune to false."
        )
    away = set(taking_part[HELD_OUT - 1 :: HELD_OUT] or taking_part[-1:])
    tuned = set(taking_part) - away
    return [one for one in records if one.sample_id in tuned], [one for one in records if one.sample_id in away]


class Tuner:
    """Tunes the blocks of one expert, with a step for as many records as are replayed together.

    Args:
        batches: the expert's records in replay.
        settings: the recipe's. scheme: of the layers. seed: of the order of records.
        device: of the replay.
        place, scratch: of the inputs that are kept of a block, see `Stream`.

    Raises:
        UsageError: no records to hold out.
    """

    def __init__(
        self,
        batches: Sequence[ReplayBatch],
        settings: TuneSettings,
        scheme: Scheme,
        seed: int,
        device: torch.device,
        place: Place = "memory",
        scratch: Path | None = None,
    ) -> None:
        self._settings, self._scheme, self._seed, self._device = settings, scheme, seed, device
        tuned, held_out = split([record for batch in batches for record in batch.records], settings.prompts)
        probes = {record.record: Probe(batch, index) for batch in batches for index, record in enumerate(batch.records)}
        self._tuned = [probes[record.record] for record in tuned]
        self._held_out = [probes[record.record] for record in held_out]
        self._inputs = Stream(place, scratch)

    def keep(self, stream: Stream) -> None:
        """Remember the original hidden states in front of a block, before the stream is moved."""
        for probe in (*self._tuned, *self._held_out):
            self._inputs[probe.name] = probe.of(stream)

    def tune(
        self,
        block: nn.Module,
        groups: Sequence[InputGroup],
        solutions: Mapping[str, LayerSolution],
        outputs: Stream,
        index: int,
    ) -> tuple[dict[str, LayerSolution], TuningEntry]:
        """The better of a block's codes before and after, and how they did; the block is left as it was.

        Args:
            block: the original.
            groups: its distinct inputs.
            solutions: of its Linears, with what their codes were rounded from.
            outputs: the original hidden states behind it.
            index: of the block; decides with the seed in which order records are taken.
        """
        plain = {name: replace(one, target=None) for name, one in solutions.items()}
        before = self._error(block, plain, outputs)
        layers, inputs = _latent(block, groups, solutions, self._scheme)
        with replaced(block, layers):
            self._descend(block, layers.values(), inputs, outputs, index)
        tuned = {name: replace(one, codes=layers[name].codes()) for name, one in plain.items()}
        after = self._error(block, tuned, outputs)
        row = TuningEntry(records=len(self._tuned), held_out=len(self._held_out), before=before, after=after)
        return tuned if row.kept else plain, row

    def _descend(
        self,
        block: nn.Module,
        layers: Iterable[LatentLinear],
        inputs: Sequence[SharedInput],
        outputs: Stream,
        index: int,
    ) -> None:
        """Move the latent weights."""
        steps = self._settings.steps
        adam = torch.optim.Adam([layer.latent for layer in layers], self._settings.lr, eps=EPSILON)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for probes in itertools.islice(self._draw(index), steps):
            hidden, context, target = self._call(probes, outputs)
            with torch.enable_grad():
                output = block(hidden, context.context, context.temb, context.rotary)
                loss = (output.float() - target).square().sum()
                loss.backward()
            adam.step()
            adam.zero_grad()
            cosine.step()
            for one in inputs:
                one.forget()

    def _draw(self, index: int) -> Iterator[list[Probe]]:
        """Records for one step after another, of one size each: all of them in a drawn order, then again in another one."""
        generator = torch.Generator().manual_seed(self._seed + index)
        while True:
            drawn = [self._tuned[i] for i in torch.randperm(len(self._tuned), generator=generator).tolist()]
            waiting: dict[CallSize, list[Probe]] = {}
            for probe in drawn:
                together = waiting.setdefault(probe.batch.size, [])
                together.append(probe)
                if len(together) == records_together(probe.batch.size):
                    yield waiting.pop(probe.batch.size)
            yield from waiting.values()

    def _call(self, probes: Sequence[Probe], outputs: Stream) -> tuple[Tensor, BlockContext, Tensor]:
        """Hidden states in front of the block, what else it receives, and what it returns, of these records."""
        contexts = [probe.context() for probe in probes]
        context = BlockContext(
            torch.cat([one.context for one in contexts]), torch.cat([one.temb for one in contexts]), contexts[0].rotary
        )
        hidden = torch.cat([self._inputs[probe.name].to(self._device) for probe in probes])
        target = torch.cat([probe.of(outputs).to(self._device) for probe in probes])
        return hidden, context, target.float()

    def _error(self, block: nn.Module, solutions: Mapping[str, LayerSolution], outputs: Stream) -> float:
        """Squared error on the held-out records, relative to the squared hidden states."""
        error = signal = 0.0
        with replaced(block, quantized_layers(block, solutions, self._scheme)):
            for probe in self._held_out:
                hidden, context, target = self._call([probe], outputs)
                found = run_block(block, hidden, context).float()
                error += float((found - target).square().sum(dtype=torch.float64))
                signal += float(target.square().sum(dtype=torch.float64))
        return error / signal if signal else 0.0


def _latent(
    block: nn.Module, groups: Sequence[InputGroup], solutions: Mapping[str, LayerSolution], scheme: Scheme
) -> tuple[dict[str, LatentLinear], list[SharedInput]]:
    """Name -> what takes the place of the block's Linears, and the inputs that they share."""
    layers, inputs = {}, []
    for group in groups:
        device, basis = block.get_submodule(group.names[0]).weight.device, solutions[group.names[0]].basis
        inputs.append(SharedInput(scheme, None if basis is None else basis.to(device), device))
        for name in group.names:
            one = solutions[name]
            assert one.target is not None  # the recipe tunes
            layers[name] = LatentLinear(block.get_submodule(name), one.codes, one.target, inputs[-1], scheme.format)
    return layers, inputs
