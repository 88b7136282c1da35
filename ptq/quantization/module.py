"""`quantize_module`: the same engine on any `nn.Module`, in place and in memory; no Wan, no files.

Three steps. Every batch runs once while all candidate Linears report which tensor object they receive: Linears that always
receive the same one (q, k, v) share one input. Then the batches run again while statistics are collected, as many inputs
at a time as fit under a memory limit. Finally the Linears are solved and replaced. Whatever goes wrong on the way, the
model is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq.config import Recipe, load_recipe
from ptq.config.recipe import check_format
from ptq.errors import UsageError
from ptq.quantization.block import install, make_collector, solve_block
from ptq.quantization.collect import InputCollector, collecting
from ptq.quantization.residual import with_residual
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.shared_inputs import InputGroup, find_shared_inputs
from ptq.quantization.targets import choose_targets
from ptq.solvers.solve import LayerSolution

DEFAULT_STATISTICS_BYTES = 4 * 2**30


@dataclass(frozen=True)
class ModuleLayer:
    """One replaced Linear.

    Attributes:
        name: of the module.
        shape: (N, K).
        shares_input_with: all Linears that read the same input, this one included.
        tokens: rows of the input that calibration saw.
        stats: errors and choices, as `ptq.solvers.solve.LayerSolution.stats` describes them.
        residual_blocks: their numbers; they are no tensors, so not in a state dict (`QuantLinear` takes them).
    """

    name: str
    shape: tuple[int, int]
    shares_input_with: tuple[str, ...]
    tokens: int
    stats: Mapping[str, object]
    residual_blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModuleReport:
    """What `quantize_module` did.

    Attributes:
        format, recipe: as used (the recipe resolved).
        layers: the replaced Linears, in the model's order.
        skipped: Linears left alone, and other modules that hold matrices -> why. Empty where targets were named.
        passes: how often the batches ran to collect statistics.
    """

    format: str
    recipe: Recipe
    layers: tuple[ModuleLayer, ...]
    skipped: Mapping[str, str]
    passes: int

    @property
    def quantized_parameters(self) -> int:
        """Weights that are now 4-bit codes."""
        return sum(n * k for n, k in (layer.shape for layer in self.layers))


@torch.no_grad()
def quantize_module(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    format: str,
    recipe: str | Recipe | None = None,
    targets: Sequence[str] | None = None,
    *,
    statistics_bytes: int = DEFAULT_STATISTICS_BYTES,
    seed: int = 0,
) -> ModuleReport:
    """Replace nn.Linears of a model by 4-bit `QuantLinear`s, in place; `model.state_dict()` then holds packed tensors.

    Args:
        model: any module; it is run in eval mode, and its training flags are restored.
        batches: keyword arguments of `model.forward`, one mapping a batch, on the model's device. All tokens weigh the
            same, padding too. They run several times, each time on copies, so that a forward may change what it is
            given (a cache of keys); an iterator that can be read only once is kept as a list.
        format: name of a registered format ("hif4", "mxfp4", or your own).
        recipe: a recipe's name or file, or a `Recipe`; default: the format's own.
        targets: names of Linears; None takes every plain nn.Linear whose K is a multiple of the group and of the
            rotation block and that the batches reach, and reports the others as skipped.
        statistics_bytes: memory for the statistics of one pass; more inputs than fit take more passes over the batches.
        seed: of token subsamples.

    Returns:
        The report of every layer.

    Raises:
        UsageError: no batches, a batch that is no mapping or cannot be copied, unknown or unsuitable target names,
            nothing to quantize, a recipe with solver.tune.
        SolverError: non-finite weights or activations.
    """
    settings = _settings(format, recipe, seed)
    batches = batches if isinstance(batches, Sequence) else list(batches)
    _check_batches(batches)
    linears, skipped = choose_targets(model, targets, settings.scheme.multiple)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        groups, unreached = find_shared_inputs(linears, lambda: _run(model, batches))
        if targets is not None and unreached:
            raise UsageError(f"The batches never reach {', '.join(unreached)}; no inputs to calibrate with.")
        skipped |= dict.fromkeys(unreached, "the batches never reach it")
        if not groups:
            raise UsageError(f"No Linear of {type(model).__name__} can be quantized to {format}: {_summary(skipped)}.")
        layers, passes = _quantize(model, batches, groups, settings, statistics_bytes)
    except BaseException:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
        raise
    finally:
        for module in training:
            module.training = True
    ordered = tuple(layers[name] for name in linears if name in layers)
    return ModuleReport(format, settings.recipe, ordered, skipped, passes)


def _settings(format_name: str, recipe: str | Recipe | None, seed: int) -> QuantizeSettings:
    name = recipe if isinstance(recipe, str) else format_name if recipe is None else "custom"
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(name, format_name)
    check_format(resolved, name, format_name)
    if resolved.solver.tune is not None:
        raise UsageError(
            f"Recipe {name} tunes the codes of transformer blocks (solver.tune), and quantize_module sees single Linears only. Set solver.tune to false."
        )
    return QuantizeSettings(format_name, resolved, name, {}, seed=seed)


def _check_batches(batches: Sequence[Any]) -> None:
    if not batches:
        raise UsageError("There are no batches; at least one is needed to calibrate with.")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise UsageError(
                f"Batch {index} is a {type(batch).__name__}; expected a mapping of keyword arguments for model.forward."
            )


def _quantize(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    groups: Sequence[InputGroup],
    settings: QuantizeSettings,
    statistics_bytes: int,
) -> tuple[dict[str, ModuleLayer], int]:
    passes = _pack(groups, settings, statistics_bytes)
    solutions: dict[str, LayerSolution] = {}
    layers: dict[str, ModuleLayer] = {}
    for part in passes:
        collectors = _collect(model, batches, part, settings)
        solved = solve_block(model, part, collectors, settings)
        for group in part:
            for name in group.names:
                n, k = solved[name].codes.elements.shape
                layers[name] = ModuleLayer(name, (n, k), group.names, group.tokens, solved[name].stats)
        solutions |= solved
    solutions = with_residual(model, solutions, groups, settings, lambda: _outputs(model, batches[0]))
    install(model, solutions, settings.scheme)  # only now, so that every pass saw the original model
    return {name: replace(one, residual_blocks=solutions[name].residual or ()) for name, one in layers.items()}, len(
        passes
    )


def _pack(groups: Sequence[InputGroup], settings: QuantizeSettings, limit: int) -> list[list[InputGroup]]:
    """Groups into passes, in order, so that the statistics of a pass fit under the limit (or are a single group's)."""
    passes: list[list[InputGroup]] = []
    used = 0
    for group in groups:
        need = statistics_size(group, settings)
        if not passes or used + need > limit:
            passes.append([])
            used = 0
        passes[-1].append(group)
        used += need
    return passes


def statistics_size(group: InputGroup, settings: QuantizeSettings) -> int:
    """Bytes of the statistics of one input: the Hessian where the recipe needs it, and the sample tokens in float32."""
    hessian = 4 * group.k**2 if settings.needs_hessian else 0
    return hessian + 4 * group.k * min(group.tokens, group.calls * settings.recipe.records.tokens_per_record)


def _collect(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], groups: Sequence[InputGroup], settings: QuantizeSettings
) -> dict[str, InputCollector]:
    """Statistics of these groups' inputs, each under its first Linear's name."""
    collectors = {group.names[0]: make_collector(settings, group.index) for group in groups}
    with collecting({name: model.get_submodule(name) for name in collectors}, collectors):
        _run(model, batches)
    return collectors


def _run(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
    """Every batch once, as it was given: what a forward changes (a cache of keys) are copies.

    What several batches hold, their copies share: of a cache that one batch fills, the next one reads.
    """
    memo: dict[int, Any] = {}
    for index, batch in enumerate(batches):
        tensors = {id(value): value.detach().clone() for value in batch.values() if isinstance(value, Tensor)}
        try:
            others = {name: copy.deepcopy(value, memo) for name, value in batch.items() if id(value) not in tensors}
        except Exception as error:  # whatever an object's own copying raises
            raise UsageError(
                f"Batch {index} cannot be copied ({error}). Batches run several times, and a forward may change what it is given, so each run takes a copy: pass tensors, containers of them and caches, made under torch.no_grad()."
            ) from error
        model(**{name: tensors[id(value)] if id(value) in tensors else others[name] for name, value in batch.items()})


def _outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """The floating-point tensors that the model returns for a batch."""
    leaves = torch.utils._pytree.tree_leaves(model(**batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _summary(skipped: Mapping[str, str]) -> str:
    """The first reasons, for an error text."""
    if not skipped:
        return "it has no nn.Linear"
    lines = [f"{name}: {reason}" if name else reason for name, reason in list(skipped.items())[:3]]
    return "; ".join(lines) + (f"; and {len(skipped) - 3} more" if len(skipped) > 3 else "")
