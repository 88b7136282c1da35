"""Which Linears of an arbitrary model can be replaced by quantized ones, and why the rest cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ptq.errors import UsageError
from ptq.runtime import QuantLinear


def choose_targets(
    model: nn.Module, targets: Sequence[str] | None, multiple: int
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Name -> Linear to replace, in the model's order, and name -> reason for the Linears, and for what else holds matrices,
    that are left alone.

    Args:
        targets: names, or None for every Linear that fits.
        multiple: K must be a multiple of this.

    Raises:
        UsageError: a named target is unknown, no Linear, or cannot be replaced; an empty list.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    reasons = _obstacles(model, modules, multiple)
    if targets is None:
        fitting = {name: modules[name] for name, reason in reasons.items() if reason is None}
        left = {name: reason for name, reason in reasons.items() if reason is not None}
        return fitting, left | _others(modules, multiple)
    if not targets:
        raise UsageError("The list of targets is empty; name Linears, or pass None for all that fit.")
    unknown = [name for name in targets if name not in reasons]
    if unknown:
        name = unknown[0]
        found = f"is a {type(modules[name]).__name__}" if name in modules else "does not exist"
        known = ", ".join(list(reasons)[:5])
        raise UsageError(
            f"Target {name!r} {found} ({len(unknown)} of {len(targets)} targets are no nn.Linear of {type(model).__name__}). Its Linears are {known}{' ...' if len(reasons) > 5 else ''}."
        )
    for name in targets:
        if reasons[name] is not None:
            raise UsageError(f"Target {name} cannot be quantized: {reasons[name]}. Leave it out of the targets.")
    return {name: modules[name] for name in reasons if name in set(targets)}, {}


def _obstacles(model: nn.Module, modules: dict[str, nn.Module], multiple: int) -> dict[str, str | None]:
    """Name of every Linear -> why it cannot be replaced, or None."""
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, module in modules.items():
        aliases[id(module)].append(name)
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    reasons: dict[str, str | None] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            others = [other for other in aliases[id(module)] if other != name]
            tied = [other for other in owners[id(module.weight)] if other != f"{name}.weight"]
            reasons[name] = _obstacle(name, module, multiple, others, tied)
    return reasons


def _others(modules: dict[str, nn.Module], multiple: int) -> dict[str, str]:
    """Modules that hold matrices, or stacks of them, without being a Linear: GPT-2's Conv1D, the experts of a mixture.

    They stay as they are, which a list of Linears would not show. Lookup tables and convolutions are left out.
    """
    found = {}
    for name, module in modules.items():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag, _ConvNd)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and _is_matrix(parameter.shape, multiple):
                kind = type(module).__name__
                found[name] = f"it is no nn.Linear but a {kind} with its own {own} {list(parameter.shape)}"
    return found


def _is_matrix(shape: torch.Size, multiple: int) -> bool:
    return len(shape) in (2, 3) and min(shape[-2:]) >= multiple and shape[0] > 1


def _obstacle(name: str, linear: nn.Linear, multiple: int, aliases: list[str], tied: list[str]) -> str | None:
    if not name:
        return "it is the whole model, which cannot be replaced in place"
    if isinstance(linear, QuantLinear):
        return "it is quantized already"
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, whose owner may read its weight directly"
    if aliases:
        return f"the same module is also {aliases[0]}"
    if tied:
        return f"its weight is also {tied[0]}"
    if linear.weight.is_meta:
        return "its weight is on the meta device (not loaded, or offloaded)"
    if linear.in_features % multiple:
        return f"K = {linear.in_features} is not a multiple of {multiple}"
    return None
