"""Quantizing one block: run the records through it, solve its Linears, put quantized Linears in their place.

The original block runs on the stream that feeds the statistics; each distinct input is solved once for all Linears that
read it. The quantized block then runs on the propagated stream, which is what later blocks will really see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ptq.quantization.calls import ReplayRecord
from ptq.quantization.collect import InputCollector, collecting
from ptq.quantization.processes import ALONE, Processes
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.streams import Stream
from ptq.runtime import QuantLinear
from ptq.scheme import Scheme
from ptq.solvers.solve import LayerSolution, solve_group
from ptq.wan.replay import input_modules, run_block
from ptq.wan.structure import INPUTS


def forward_stream(
    block: nn.Module, records: Sequence[ReplayRecord], source: Stream, target: Stream, device: torch.device
) -> None:
    """Run every record's hidden states through the block, from one stream into another (or the same)."""
    for item in records:
        hidden = source[item.record.record].to(device)
        target[item.record.record] = run_block(block, hidden, item.context())


def make_collector(settings: QuantizeSettings, index: int) -> InputCollector:
    """A collector of what the recipe needs to know of one input; `index` tells inputs apart in the seeds."""
    recipe = settings.recipe
    return InputCollector(
        recipe.records.tokens_per_record,
        hessian=settings.needs_hessian,
        hessian_tokens=recipe.records.hessian_tokens,
        seed=settings.seed + index,
    )


def collect_statistics(
    block: nn.Module,
    records: Sequence[ReplayRecord],
    source: Stream,
    settings: QuantizeSettings,
    device: torch.device,
    target: Stream | None = None,
) -> dict[str, InputCollector]:
    """Run the original block on `source` and gather the statistics of its seven inputs.

    Args:
        target: where to store the block's outputs, if they are wanted.
    """
    collectors = {name: make_collector(settings, index) for index, name in enumerate(INPUTS)}
    with collecting(input_modules(block), collectors):
        for item in records:
            output = run_block(block, source[item.record.record].to(device), item.context())
            if target is not None:
                target[item.record.record] = output
    return collectors


def solve_block(
    block: nn.Module,
    collectors: dict[str, InputCollector],
    settings: QuantizeSettings,
    processes: Processes = ALONE,
    inputs: Mapping[str, Sequence[str]] = INPUTS,
) -> dict[str, LayerSolution]:
    """Codes and bases of the block's Linears; each distinct input is solved once, by one process.

    Args:
        collectors: statistics of each input; emptied on the way, so that a Hessian is gone once its Linears are solved.
        inputs: input -> the Linears that read it, by default those of a Wan block.
    """
    modules_of = {name: {linear: block.get_submodule(linear) for linear in linears} for name, linears in inputs.items()}
    own = processes.own({name: solve_cost(modules.values()) for name, modules in modules_of.items()})
    solutions: dict[str, LayerSolution] = {}
    for name in collectors.keys() - own:
        del collectors[name]
    for name in (name for name in inputs if name in own):
        modules = modules_of[name]
        solutions |= solve_group(
            {linear: module.weight.float() for linear, module in modules.items()},
            collectors.pop(name).stats(),
            settings.scheme,
            settings.recipe.solver,
        )
    solutions = processes.merge(solutions)
    return {linear: solutions[linear] for linears in inputs.values() for linear in linears}


def solve_cost(linears: Iterable[nn.Module]) -> float:
    """Work of one input's solve, up to a factor: K^3 for the factorisation and K^2 for each row."""
    weights = [linear.weight for linear in linears]
    k = weights[0].shape[1]
    return float(k**3 + k**2 * sum(weight.shape[0] for weight in weights))


def install(block: nn.Module, solutions: Mapping[str, LayerSolution], scheme: Scheme) -> None:
    """Replace the block's Linears by quantized ones, in place."""
    for name, solution in solutions.items():
        linear = block.get_submodule(name)
        # The layer's own copy: on disk Linears of one input do not share the basis.
        basis = None if solution.basis is None else solution.basis.clone()
        bias = None if linear.bias is None else linear.bias.float()
        layer = QuantLinear.from_codes(solution.codes, scheme, bias, basis)
        block.set_submodule(name, layer.to(linear.weight.device))


def stream_error(records: Sequence[ReplayRecord], reference: Stream, candidate: Stream) -> float:
    """Squared norm of the difference of two streams, relative to the reference's."""
    error = signal = 0.0
    for item in records:
        original = reference[item.record.record].float()
        error += float((candidate[item.record.record].float() - original).square().sum(dtype=torch.float64))
        signal += float(original.square().sum(dtype=torch.float64))
    return error / signal if signal else 0.0
