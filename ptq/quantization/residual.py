"""Residual blocks of a whole expert: gains kept with its finished blocks, one choice when all of them are there.

One budget for an expert, because noise is not spread evenly: some inputs of some blocks carry most of it (docs/quality.md). The
codes do not depend on the choice, so blocks are solved and resumed as without it; only the stream of quantized hidden states waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq.quantization.block import quantized_layers, replaced
from ptq.quantization.calls import Probe, ReplayBatch, spread
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.shared_inputs import InputGroup
from ptq.quantization.workdir import InputGains, WorkDir
from ptq.scheme import Scheme
from ptq.solvers.residual import BlockGains, choose_blocks
from ptq.solvers.solve import LayerSolution
from ptq.wan.block import block_prefix

PROBES = 4
"""Records that pass through a block once for each of its inputs."""
ChosenBlocks = dict[int, dict[str, tuple[int, ...]]]
"""Block of an expert -> Linear -> its residual blocks."""


def sensitivity(
    model: nn.Module,
    names: Sequence[str],
    solutions: Mapping[str, LayerSolution],
    scheme: Scheme,
    outputs: Callable[[], Iterable[Tensor]],
    reference: Sequence[Tensor],
) -> float:
    """Relative squared error of a model's outputs with only the Linears of one input quantized, for each unit of their own.

    Args:
        model: the original, or one of its blocks; it is left as it was.
        names: of the Linears.
        outputs: runs the model. reference: what it gives with every Linear original.
    """
    own = sum(float(str(solutions[name].stats["output_error"] or 0.0)) for name in names)
    with replaced(model, quantized_layers(model, {name: solutions[name] for name in names}, scheme)):
        error = sum(_relative_error(y, y0) for y, y0 in zip(outputs(), reference, strict=True))
    return error / own if own else 0.0


def _relative_error(y: Tensor, reference: Tensor) -> float:
    y, reference = y.float(), reference.to(y.device, torch.float32)
    return float((y - reference).square().sum() / reference.square().sum().clamp(min=1e-30))


def probed(batches: Sequence[ReplayBatch]) -> list[Probe]:
    """PROBES of the records, evenly spaced in order of sigma."""
    chosen = {record.record for record in spread([record for batch in batches for record in batch.records], PROBES)}
    return [
        Probe(batch, index)
        for batch in batches
        for index, record in enumerate(batch.records)
        if record.record in chosen
    ]


def input_gains(
    block: nn.Module,
    groups: Iterable[InputGroup],
    solutions: Mapping[str, LayerSolution],
    scheme: Scheme,
    outputs: Callable[[], Iterable[Tensor]],
    reference: Sequence[Tensor],
) -> list[dict[str, Any]]:
    """What the statistics file of a block keeps of its inputs, see `sensitivity`."""
    kept = []
    for group in groups:
        gains = solutions[group.names[0]].gains
        assert gains is not None  # the recipe has residual blocks
        felt = sensitivity(block, group.names, solutions, scheme, outputs, reference)
        one = InputGains(linears=list(group.names), gains=list(gains.gains), rows=gains.rows, sensitivity=felt)
        kept.append(one.model_dump(mode="json"))
    return kept


def choose_residual(work: WorkDir, expert: str, blocks: Sequence[int], share: float) -> ChosenBlocks:
    """The residual blocks of an expert whose blocks are all finished.

    Args:
        blocks: its unprotected ones.
        share: of the products of their Linears that may be added.
    """
    gains: dict[tuple[int, int], BlockGains] = {}
    linears: dict[tuple[int, int], list[str]] = {}
    products = 0
    for index in blocks:
        finished = work.load_block(expert, index)
        assert finished is not None  # it was written a moment ago
        for number, one in enumerate(finished[1]["inputs"]):
            gains[index, number] = BlockGains(tuple(one["gains"]), one["rows"], one["sensitivity"])
            linears[index, number] = one["linears"]
        products += sum(math.prod(layer["shape"]) for layer in finished[1]["layers"])
    chosen: ChosenBlocks = {index: {} for index in blocks}
    for (index, number), numbers in choose_blocks(gains, share * products).items():
        chosen[index].update(dict.fromkeys(linears[index, number], numbers))
    return chosen


def listed(chosen: ChosenBlocks) -> dict[str, tuple[int, ...]]:
    """As config.json lists it: layers by their names in the expert, those without a residual block left out."""
    named = ((f"{block_prefix(index)}{name}", blocks) for index, by in chosen.items() for name, blocks in by.items())
    return {name: blocks for name, blocks in named if blocks}


def with_residual(
    model: nn.Module,
    solutions: Mapping[str, LayerSolution],
    groups: Iterable[InputGroup],
    settings: QuantizeSettings,
    outputs: Callable[[], Iterable[Tensor]],
) -> dict[str, LayerSolution]:
    """Solutions of a module with their residual blocks, under one budget; unchanged where the share is 0.

    Args:
        groups: the distinct inputs and their Linears.
        outputs: runs the model.
    """
    share = settings.recipe.solver.residual
    if not share:
        return dict(solutions)
    reference, gains = list(outputs()), {}
    for group in groups:
        one = solutions[group.names[0]].gains
        assert one is not None  # the recipe has residual blocks
        felt = sensitivity(model, group.names, solutions, settings.scheme, outputs, reference)
        gains[group.names] = replace(one, sensitivity=felt)
    products = sum(solution.codes.elements.numel() for solution in solutions.values())
    chosen = choose_blocks(gains, share * products)
    return {name: replace(solutions[name], residual=blocks) for names, blocks in chosen.items() for name in names}
