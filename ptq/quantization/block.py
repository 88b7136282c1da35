"""Quantizing one block: run the records through it, solve its Linears, put quantized Linears in their place.

The original block runs on the original stream, which feeds the statistics; each distinct input is solved once for all Linears
that read it. The quantized block then runs on the propagated stream, which is what later blocks will really see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ptq.errors import PtqError
from ptq.quantization.calls import ReplayBatch
from ptq.quantization.collect import InputCollector, collecting
from ptq.quantization.placing import conversion_on, solve_device
from ptq.quantization.processes import ALONE, Processes
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.shared_inputs import InputGroup, find_shared_inputs
from ptq.quantization.streams import Stream
from ptq.runtime import QuantLinear
from ptq.scheme import Scheme
from ptq.solvers.solve import LayerSolution, solve_group
from ptq.wan.replay import run_block


def forward_stream(
    block: nn.Module, batches: Sequence[ReplayBatch], source: Stream, target: Stream, device: torch.device
) -> None:
    """Run every record's hidden states through the block, from one stream into another (or the same)."""
    names = [batch.name for batch in batches]
    for batch, hidden in zip(batches, source.visit(names, device), strict=True):
        target[batch.name] = run_block(block, hidden, batch.context())


def make_collector(settings: QuantizeSettings, index: int) -> InputCollector:
    """A collector of what the recipe needs to know of one input; `index` tells inputs apart in the seeds."""
    records = settings.recipe.records
    return InputCollector(
        records.tokens_per_record,
        hessian=settings.needs_hessian,
        hessian_tokens=records.hessian_tokens,
        seed=settings.seed + index,
    )


def collect_statistics(
    block: nn.Module,
    groups: Sequence[InputGroup],
    batches: Sequence[ReplayBatch],
    stream: Stream,
    settings: QuantizeSettings,
    device: torch.device,
) -> dict[str, InputCollector]:
    """Run the original block on a stream, in place, and gather the statistics of its inputs, each under its first Linear."""
    collectors = {group.names[0]: make_collector(settings, group.index) for group in groups}
    _collect(block, collectors, batches, stream, device)
    return collectors


def find_and_collect(
    block: nn.Module,
    targets: Iterable[str],
    batches: Sequence[ReplayBatch],
    stream: Stream,
    settings: QuantizeSettings,
    device: torch.device,
) -> tuple[list[InputGroup], dict[str, InputCollector]]:
    """`collect_statistics` of a block whose inputs are not known yet: the first batch shows which targets read each.

    Raises:
        PtqError: a target that the records never reach.
    """
    linears = {name: block.get_submodule(name) for name in targets}
    found: list[InputCollector] = []

    def see(x: Tensor) -> None:
        found.append(make_collector(settings, len(found)))
        found[-1].update(x, batched=True)

    groups, unreached = find_shared_inputs(
        linears, lambda: forward_stream(block, batches[:1], stream, stream, device), see
    )
    if unreached:
        raise PtqError(
            f"The recorded calls never reach {', '.join(unreached)} of a block, so nothing is known of their inputs. Record this model again with `ptq calibrate`."
        )
    assert len(found) == len(groups)  # a forward of a block calls each Linear once
    collectors = {group.names[0]: found[group.index] for group in groups}
    _collect(block, collectors, batches[1:], stream, device)
    return groups, collectors


def _collect(
    block: nn.Module,
    collectors: dict[str, InputCollector],
    batches: Sequence[ReplayBatch],
    stream: Stream,
    device: torch.device,
) -> None:
    with collecting({name: block.get_submodule(name) for name in collectors}, collectors, batched=True):
        forward_stream(block, batches, stream, stream, device)


def solve_block(
    block: nn.Module,
    groups: Sequence[InputGroup],
    collectors: dict[str, InputCollector],
    settings: QuantizeSettings,
    processes: Processes = ALONE,
) -> dict[str, LayerSolution]:
    """Codes and bases of the block's Linears; each distinct input is solved once, by one process.

    Args:
        groups: the inputs to solve.
        collectors: statistics of each input; emptied on the way, so that a Hessian is gone once its Linears are solved.
    """
    modules_of = {group.names[0]: {name: block.get_submodule(name) for name in group.names} for group in groups}
    own = processes.own({name: solve_cost(modules.values()) for name, modules in modules_of.items()})
    solutions: dict[str, LayerSolution] = {}
    for name in collectors.keys() - own:
        del collectors[name]
    for name, modules in modules_of.items():
        if name in own:
            home = next(iter(modules.values())).weight.device
            device = solve_device(home, solve_cost(modules.values()))
            weights = {linear: module.weight.to(device, torch.float32) for linear, module in modules.items()}
            stats = collectors.pop(name).stats().to(device)
            conversion = conversion_on(device, settings.scheme)
            solutions |= solve_group(weights, stats, settings.scheme, settings.recipe.solver, conversion)
    solutions = processes.merge(solutions)
    return {linear: solutions[linear] for modules in modules_of.values() for linear in modules}


def solve_cost(linears: Iterable[nn.Module]) -> float:
    """Work of one input's solve, up to a factor: K^3 for the factorisation and K^2 for each row."""
    weights = [linear.weight for linear in linears]
    k = weights[0].shape[1]
    return float(k**3 + k**2 * sum(weight.shape[0] for weight in weights))


def quantized_layers(
    block: nn.Module, solutions: Mapping[str, LayerSolution], scheme: Scheme
) -> dict[str, QuantLinear]:
    """Name -> quantized layer for the place of each Linear, on its device."""
    layers = {}
    for name, solution in solutions.items():
        linear = block.get_submodule(name)
        # The layer's own copy: on disk Linears of one input do not share the basis.
        basis = None if solution.basis is None else solution.basis.clone()
        bias = None if linear.bias is None else linear.bias.to(solution.codes.elements.device, torch.float32)
        layer = QuantLinear.from_codes(solution.codes, scheme, bias, basis, solution.residual)
        layers[name] = layer.to(linear.weight.device)
    return layers


def install(block: nn.Module, solutions: Mapping[str, LayerSolution], scheme: Scheme) -> None:
    """Replace the block's Linears by quantized ones, in place."""
    for name, layer in quantized_layers(block, solutions, scheme).items():
        block.set_submodule(name, layer)


@contextlib.contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """For a while, other layers in the place of the model's."""
    own = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in own.items():
            model.set_submodule(name, layer)


def stream_error(batches: Sequence[ReplayBatch], reference: Stream, candidate: Stream, device: torch.device) -> float:
    """Squared norm of the difference of two streams, relative to the reference's."""
    names = [batch.name for batch in batches]
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for original, changed in zip(reference.visit(names, device), candidate.visit(names, device), strict=True):
        original = original.float()
        totals[0] += (changed.float() - original).square_().sum(dtype=torch.float64)
        totals[1] += original.square().sum(dtype=torch.float64)
    error, signal = totals.tolist()
    return error / signal if signal else 0.0
