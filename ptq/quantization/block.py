"""Quantizing one block: run the records through it, solve its Linears, put quantized Linears in their place.

The original block runs on the stream that feeds the statistics; each distinct input is solved once for all Linears that
read it. The quantized block then runs on the propagated stream, which is what later blocks will really see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ptq import formats
from ptq.quantization.calls import ReplayRecord
from ptq.quantization.collect import InputCollector, collecting
from ptq.quantization.processes import ALONE, Processes
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.streams import Stream
from ptq.runtime import QuantLinear
from ptq.solvers.solve import LayerSolution, SolveSettings, solve_group
from ptq.wan.block import input_modules, readers
from ptq.wan.replay import run_block


def solve_settings(settings: QuantizeSettings) -> SolveSettings:
    """The recipe as the solvers take it."""
    recipe = settings.recipe
    return SolveSettings(
        rounding=recipe.rounding,
        rotation=recipe.rotation,
        smoothing=recipe.smoothing,
        learned_transform=recipe.learned_transform,
        clip_search=recipe.clip_search,
        bias_correction=recipe.bias_correction,
        damping=recipe.gptq.damping,
        act_order=recipe.gptq.act_order,
        float64=recipe.gptq.precision == "float64",
        weight_scale_rule=recipe.weight_scale_rule,
        activation_scale_rule=recipe.activations.scale_rule,
        activation_ties=recipe.activations.ties,
    )


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
        hessian=recipe.needs_hessian,
        hessian_tokens=recipe.records.hessian_tokens,
        seed=settings.seed + index,
        dtype=torch.float64 if recipe.gptq.precision == "float64" else torch.float32,
    )


def collect_statistics(
    block: nn.Module,
    records: Sequence[ReplayRecord],
    source: Stream,
    settings: QuantizeSettings,
    device: torch.device,
    target: Stream | None = None,
) -> dict[str, InputCollector]:
    """Run the original block on `source` and gather the statistics of its distinct inputs.

    Args:
        target: where to store the block's outputs, if they are wanted.
    """
    modules = input_modules(block)
    collectors = {name: make_collector(settings, index) for index, name in enumerate(modules)}
    with collecting(modules, collectors) as state:
        for item in records:
            state["weight"] = item.weight
            output = run_block(block, source[item.record.record].to(device), item.context())
            if target is not None:
                target[item.record.record] = output
    return collectors


def solve_block(
    block: nn.Module,
    collectors: dict[str, InputCollector],
    settings: QuantizeSettings,
    processes: Processes = ALONE,
    inputs: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, LayerSolution]:
    """Codes, bases and biases of the block's Linears; each distinct input is solved once, by one process.

    Args:
        collectors: statistics of each input; emptied on the way, so that a Hessian is gone once its Linears are solved.
        inputs: input -> the Linears that read it, by default those of a Wan block.
    """
    fmt, inputs = formats.get(settings.format), readers(block) if inputs is None else inputs
    modules_of = {name: {linear: block.get_submodule(linear) for linear in linears} for name, linears in inputs.items()}
    own = processes.own({name: solve_cost(modules.values()) for name, modules in modules_of.items()})
    solutions: dict[str, LayerSolution] = {}
    for name in collectors.keys() - own:
        del collectors[name]
    for name in (name for name in inputs if name in own):
        modules = modules_of[name]
        solutions |= solve_group(
            {linear: module.weight.float() for linear, module in modules.items()},
            {linear: None if module.bias is None else module.bias.float() for linear, module in modules.items()},
            collectors.pop(name).stats(),
            fmt,
            solve_settings(settings),
        )
    solutions = processes.merge(solutions)
    return {linear: solutions[linear] for linears in inputs.values() for linear in linears}


def solve_cost(linears: Iterable[nn.Module]) -> float:
    """Work of one input's solve, up to a factor: K^3 for the factorisation and K^2 for each row."""
    weights = [linear.weight for linear in linears]
    k = weights[0].shape[1]
    return float(k**3 + k**2 * sum(weight.shape[0] for weight in weights))


def install(block: nn.Module, solutions: Mapping[str, LayerSolution], settings: QuantizeSettings) -> None:
    """Replace the block's Linears by quantized ones, in place."""
    for name, solution in solutions.items():
        linear = block.get_submodule(name)
        layer = QuantLinear.from_codes(
            solution.codes, settings.spec, solution.bias, _stored_basis(solution, settings, linear)
        )
        block.set_submodule(name, layer.to(linear.weight.device))


def _stored_basis(solution: LayerSolution, settings: QuantizeSettings, linear: nn.Module) -> Tensor | None:
    """The layer's own copy: on disk Linears of one input do not share it."""
    if settings.spec.smooth and solution.basis.smooth_k is None:
        return torch.ones(linear.in_features, dtype=torch.bfloat16)  # none was chosen, but every layer stores one
    stored = solution.basis.stored
    return None if stored is None else stored.clone()


def stream_error(records: Sequence[ReplayRecord], reference: Stream, candidate: Stream) -> float:
    """Weighted squared norm of the difference of two streams, relative to the reference's."""
    error = signal = 0.0
    for item in records:
        original = reference[item.record.record].float()
        error += item.weight * float(
            (candidate[item.record.record].float() - original).square().sum(dtype=torch.float64)
        )
        signal += item.weight * float(original.square().sum(dtype=torch.float64))
    return error / signal if signal else 0.0
