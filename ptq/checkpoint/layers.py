"""The quantized layers of a checkpoint: which they are, into empty modules and out of files, where their weights land."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.shards import ShardSet
from ptq.errors import PtqError
from ptq.runtime import PackedWeight, QuantLinear
from ptq.scheme import Scheme, get_format
from ptq.scheme.placement import summarize

PACKED = ".weight_packed"
"""Suffix by which the tensors of a file tell their quantized layers."""


def replace_linears(model: nn.Module, packed: PackedConfig) -> list[str]:
    """Replace, in place and on the meta device, every Linear that `packed` declares; returns their names.

    Raises:
        PtqError: residual blocks that a layer does not have, or of no such layer.
    """
    modules = dict(model.named_modules())
    names = [name for name in packed.layer_names(modules) if isinstance(modules[name], nn.Linear)]
    unknown = sorted((packed.residual or {}).keys() - set(names))
    if unknown:
        raise PtqError(
            f"quantization_config lists residual blocks of {unknown[0]}, which is no quantized layer of this model ({len(unknown)} such). The configuration is damaged or of another model; copy the checkpoint again."
        )
    for name in names:
        linear = modules[name]
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        residual = packed.residual_of(name, linear.in_features)
        model.set_submodule(name, QuantLinear(*sizes, packed.scheme, residual=residual, device="meta"))
    return names


def layer_names(tensor_names: Iterable[str]) -> list[str]:
    """Quantized layers among the tensors of a file."""
    return [name.removesuffix(PACKED) for name in tensor_names if name.endswith(PACKED)]


def read_layer(read: Callable[[str], Tensor], name: str, scheme: Scheme, bias: Tensor | None = None) -> PackedWeight:
    """The weight of a layer from its tensors.

    Args:
        read: full tensor name -> tensor.
    """
    basis = scheme.transform.tensor
    stored = None if basis is None else read(f"{name}.{basis}")
    return PackedWeight(read(f"{name}{PACKED}"), read(f"{name}.weight_scale"), bias, stored, scheme)


def describe_placements(checkpoint: Path, experts: Iterable[str], format_name: str, rule: str | None) -> dict[str, str]:
    """Expert -> how many of its weights go on which rung of the FP8 ladder, and which do not fit; for `ptq doctor`.

    Empty where inputs quantized by this rule are not exact in FP8.
    """
    fmt, facts = get_format(format_name), {}
    for expert in sorted(experts) if fmt.exact_in_fp8(rule) else ():
        shards = ShardSet(checkpoint / expert)
        placements = {
            name: fmt.place(shards.read(f"{name}{PACKED}"), shards.read(f"{name}.weight_scale"))
            for name in layer_names(shards.entries)
        }
        facts[f"FP8 placement, {expert}"] = "; ".join(summarize(placements))
    return facts
