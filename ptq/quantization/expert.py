"""Quantizing one expert: its blocks in order, two streams of hidden states, resumable after every block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ptq import ui
from ptq.checkpoint.layers import layer_names, read_layer
from ptq.checkpoint.manifest import BlockEntry, ExpertEntry, LayerEntry, TuningEntry
from ptq.checkpoint.safetensors_file import TensorEntry
from ptq.quantization.block import (
    collect_statistics,
    find_and_collect,
    forward_stream,
    install,
    solve_block,
    solve_cost,
    stream_error,
)
from ptq.quantization.job import Job
from ptq.quantization.placing import Place, solve_device
from ptq.quantization.residual import ChosenBlocks, choose_residual, input_gains, listed, probed
from ptq.quantization.shared_inputs import InputGroup
from ptq.quantization.tune import Tuner
from ptq.quantization.workdir import STREAMS_DIR, WorkDir
from ptq.quantization.writer import BlockWriter
from ptq.runtime import QuantLinear
from ptq.scheme.residual import to_flags
from ptq.solvers.solve import LayerSolution
from ptq.wan.block import block_prefix
from ptq.wan.replay import run_block


@dataclass
class ExpertResult:
    """What one expert yields: entries of the changed tensors, the manifest's rows, residual blocks as `PackedConfig` has them."""

    changed: dict[str, TensorEntry]
    blocks: list[BlockEntry]
    layers: list[LayerEntry]
    summary: ExpertEntry
    residual: dict[str, tuple[int, ...]] | None = None


class ExpertRun:
    """Quantizes the blocks of one expert from recorded calls.

    Args:
        job: the run. name: the expert.
        work: where finished blocks go.
        place: where both streams of hidden states are.

    Raises:
        PtqError: no records for this expert.
    """

    def __init__(self, job: Job, name: str, work: WorkDir, place: Place) -> None:
        self.name, self.work, self.settings = name, work, job.settings
        self.replay, self._processes = job.replay(name), job.processes
        self._targets = job.packed(name).targets
        self._groups: list[InputGroup] = []
        self._calls = job.calls(name, self.replay)
        self._batches = self._calls.batches
        self._start = lambda: self._calls.start(place, work.path / STREAMS_DIR)
        self._original = self._start()
        self._propagated = self._calls.copy(self._original, place, work.path / STREAMS_DIR)
        self._residual: ChosenBlocks | None = None
        tune, settings = self.settings.recipe.solver.tune, self.settings
        self._tuner = None
        if tune is not None and self._processes.first:
            where = (self.replay.device, place, work.path / STREAMS_DIR)
            self._tuner = Tuner(self._batches, tune, settings.scheme, settings.seed, *where)

    def run(self, bar: ui.Progress) -> ExpertResult:
        """Quantize every block, or take it from an earlier run, and measure the denoiser's output error."""
        result = ExpertResult({}, [], [], ExpertEntry(expert=self.name, denoiser_error=0.0, records=self._calls.count))
        share, protected = self.settings.recipe.solver.residual, self.settings.high_precision.get(self.name, {})
        if share:
            unprotected = [index for index in range(self.replay.num_blocks) if index not in protected]
            self._solve_all(unprotected, bar)
            self._residual = choose_residual(self.work, self.name, unprotected, share)
            result.residual = listed(self._residual)
            if not result.residual and unprotected:
                ui.warn(
                    f"No residual block of {self.name} fits into solver.residual = {share:g} of its products, so it has none. Set a larger share, or 0, which does not replay the records a second time."
                )
        with BlockWriter(self.work, self.name) as writer:
            for index in range(self.replay.num_blocks):
                entries, info = self._block(index, writer)
                result.changed.update(entries)
                result.blocks.append(BlockEntry(**info["block"]))
                result.layers += [LayerEntry(**layer) for layer in info["layers"]]
                bar.advance(note=f"{self.name} block {index}, stream error {info['block']['stream_error']:.2e}")
        result.changed.update(writer.entries)
        error = self._calls.output_error(self._original, self._propagated)
        result.summary = result.summary.model_copy(update={"denoiser_error": error})
        return result

    def _solve_all(self, blocks: Sequence[int], bar: ui.Progress) -> None:
        """Solve and write those of these blocks that are not there yet, on the original stream alone."""
        missing = [index for index in blocks if self.work.load_block(self.name, index) is None]
        with BlockWriter(self.work, self.name) as writer:
            for index in range(self.replay.num_blocks):
                if missing and index <= missing[-1]:
                    start, block = time.monotonic(), self.replay.load_block(index)
                    if index in missing:
                        info = self._solve(index, block)
                        row = self._row(index, time.monotonic() - start, None, info.pop("tuning"))
                        self._put(writer, index, block, {**info, "block": row})
                    else:
                        forward_stream(block, self._batches, self._original, self._original, self.replay.device)
                bar.advance(note=f"{self.name} block {index}, codes")
        self._processes.wait()
        del self._original  # its memory is that of the next one
        self._original = self._start()

    def _block(self, index: int, writer: BlockWriter) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
        """Entries of a block that was finished before, and the manifest's rows of the block."""
        start = time.monotonic()
        block = self.replay.load_block(index)
        device = self.replay.device
        reason = self.settings.high_precision.get(self.name, {}).get(index)
        finished = None if reason else self.work.load_block(self.name, index)
        if finished is not None or reason:
            forward_stream(block, self._batches, self._original, self._original, device)
            if finished is not None:
                self._fill(block, index, finished[0])
            forward_stream(block, self._batches, self._propagated, self._propagated, device)
            entries, info = finished or ({}, {"layers": []})
            if self._residual is not None:
                rows = [{**row, "residual_blocks": self._residual[index][row["layer"]]} for row in info["layers"]]
                info = {**info, "layers": rows}
            seconds = info["block"]["seconds"] if finished else time.monotonic() - start
            tuning = info["block"]["tuning"] if finished else None
            return entries, {**info, "block": self._row(index, seconds, reason, tuning)}
        info = self._solve(index, block)
        forward_stream(block, self._batches, self._propagated, self._propagated, device)
        info["block"] = self._row(index, time.monotonic() - start, None, info.pop("tuning"))
        self._put(writer, index, block, info)
        return {}, info

    def _solve(self, index: int, block: nn.Module) -> dict[str, Any]:
        """Put a block's codes in the place of its Linears; returns the manifest's rows of them. Moves the original stream."""
        device = self.replay.device
        probes = probed(self._batches) if self.settings.recipe.solver.residual else []
        before = [probe.of(self._original).clone() for probe in probes]
        replayed = (self._batches, self._original, self.settings, device)
        if self._tuner is not None:
            self._tuner.keep(self._original)
        if self._groups:
            collectors = collect_statistics(block, self._groups, *replayed)
        else:  # they are the same in every block
            self._groups, collectors = find_and_collect(block, self._targets, *replayed)
            self._say_where(block)
        solutions = solve_block(block, self._groups, collectors, self.settings, self._processes)
        solutions, tuning = self._tuned(index, block, solutions)
        layers = []
        for linear, solution in solutions.items():
            n, k = solution.codes.elements.shape
            row = {"expert": self.name, "block": index, "layer": linear, "shape": (n, k), **solution.stats}
            layers.append(LayerEntry.model_validate(row).model_dump(mode="json"))
        inputs = []
        if probes and self._processes.first:
            after = [probe.of(self._original) for probe in probes]

            def outputs() -> list[Tensor]:
                pairs = zip(before, probes, strict=True)
                return [run_block(block, hidden.to(device), probe.context()) for hidden, probe in pairs]

            inputs = input_gains(block, self._groups, solutions, self.settings.scheme, outputs, after)
        install(block, solutions, self.settings.scheme)
        return {"layers": layers, "inputs": inputs, "tuning": tuning}

    def _tuned(
        self, index: int, block: nn.Module, solutions: dict[str, LayerSolution]
    ) -> tuple[dict[str, LayerSolution], dict[str, Any] | None]:
        """The solutions to go on with, and the manifest's row of tuning them; the first process tunes for all."""
        if self.settings.recipe.solver.tune is None:
            return solutions, None
        start, result = time.monotonic(), {}
        if self._tuner is not None:
            result["tuned"] = self._tuner.tune(block, self._groups, solutions, self._original, index)
        solutions, row = self._processes.merge(result)["tuned"]
        if self._tuner is not None:
            ui.info(
                f"Block {index} of {self.name}, {row.held_out} records held out: error {row.before:.3e}, tuned in {ui.format_seconds(time.monotonic() - start)} {row.after:.3e}, {'kept' if row.kept else 'not kept'}."
            )
        return solutions, row.model_dump(mode="json")

    def _put(self, writer: BlockWriter, index: int, block: nn.Module, info: dict[str, Any]) -> None:
        """Write a solved block; one process does."""
        if self._processes.first:
            writer.put(index, changed_tensors(block, block_prefix(index)), info)

    def _say_where(self, block: nn.Module) -> None:
        """Tell which inputs are solved on the CPU though the run has a GPU."""
        device = self.replay.device
        costs = [solve_cost(block.get_submodule(name) for name in group.names) for group in self._groups]
        small = sum(solve_device(device, cost) != device for cost in costs)
        if small:
            ui.info(
                f"{small} of the {len(costs)} inputs of a block of {self.name} are solved on the CPU: they are too small to be faster on {device}."
            )

    def _row(self, index: int, seconds: float, reason: str | None, tuning: dict[str, Any] | None) -> dict[str, Any]:
        """The manifest's row of a block, from the two streams as they stand behind it."""
        row = BlockEntry(
            expert=self.name,
            block=index,
            stream_error=stream_error(self._batches, self._original, self._propagated, self.replay.device),
            high_precision=reason is not None,
            reason=reason,
            seconds=round(seconds, 3),
            tuning=None if tuning is None else TuningEntry.model_validate(tuning),
        )
        return row.model_dump(mode="json")

    def _fill(self, block: nn.Module, index: int, entries: dict[str, TensorEntry]) -> None:
        """Put the finished codes of an earlier run into the block."""
        from safetensors.torch import load_file

        prefix = block_prefix(index)
        files = {entry.file for entry in entries.values()}
        tensors = {name.removeprefix(prefix): t for file in files for name, t in load_file(file).items()}
        for name in layer_names(tensors):
            linear = block.get_submodule(name)
            bias = None if linear.bias is None else linear.bias.float()
            weight = read_layer(tensors.__getitem__, name, self.settings.scheme, bias)
            if self._residual is not None:
                weight = replace(weight, residual=to_flags(self._residual[index][name], weight.k))
            layer = QuantLinear.from_packed(weight)
            block.set_submodule(name, layer.to(self.replay.device))


def changed_tensors(block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Tensors of a quantized block that the original does not have: codes, scales, basis."""
    return {
        f"{prefix}{name}.{key}": value.detach().cpu()
        for name, module in block.named_modules()
        if isinstance(module, QuantLinear)
        for key, value in module.state_dict().items()
        if key != "bias"
    }
