"""Turning a model's target Linears into empty `QuantLinear`s, ready to be filled from a packed checkpoint."""

from __future__ import annotations

from torch import nn

from ptq.checkpoint.quantization_config import PackedConfig
from ptq.runtime import QuantLinear


def replace_linears(model: nn.Module, packed: PackedConfig) -> list[str]:
    """Replace, in place and on the meta device, every Linear that `packed` declares; returns their names."""
    modules = dict(model.named_modules())
    names = [name for name in packed.layer_names(modules) if isinstance(modules[name], nn.Linear)]
    for name in names:
        linear = modules[name]
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        model.set_submodule(name, QuantLinear(*sizes, packed.spec, device="meta"))
    return names
