"""The CPU path of a quantized layer, in float32: decoded weight (cached up to a limit), quantized input (shared by the
layers that read it), F.linear.

float32 because it is several times faster than bfloat16 on processors without matrix extensions, and because it is then
the fake-quant reference itself, up to the accumulation order of the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq.runtime.backends import Backend, register_backend
from ptq.runtime.cache import from_environment
from ptq.runtime.last_input import shared_by_key, value_key
from ptq.runtime.weight import PackedWeight

TILE_BYTES = 64 * 2**20
"""Decoded float32 bytes of one tile of output rows where the whole weight is not cached."""

decoded_cache = from_environment()


@dataclass(frozen=True)
class _Layer:
    """What a layer computes with, looked up once a call; of a small model, calls cost as much as arithmetic.

    Attributes:
        operand: `PackedWeight.operand`, or None where it is decoded tile by tile.
        basis: as `Scheme.quantize_input` computes with it; its `value_key`. bias: float32.
        blocks: those that have a residual.
    """

    operand: Tensor | None
    basis: Tensor | None
    value_key: bytes | None
    bias: Tensor | None
    blocks: tuple[int, ...]


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [..., K] of any float dtype -> [..., N] in the same dtype."""
    layer, scheme = _layer(weight), weight.scheme
    key = layer.value_key, scheme, layer.blocks
    quantized = shared_by_key(x, key, lambda: scheme.quantize_input(x, layer.basis, layer.blocks))
    if layer.operand is not None:
        output = F.linear(quantized, layer.operand, layer.bias)
    else:
        output = quantized.new_empty(*x.shape[:-1], weight.n)
        rows = max(1, TILE_BYTES // (4 * weight.width))
        for start in range(0, weight.n, rows):
            tile = slice(start, min(start + rows, weight.n))
            bias = None if layer.bias is None else layer.bias[tile]
            output[..., tile] = F.linear(quantized, weight.operand(tile), bias)
    return output if x.dtype == torch.float32 else output.to(x.dtype)


def _layer(weight: PackedWeight) -> _Layer:
    """From the cache, where the decoded weight fits; its blocks may fit where it does not."""
    held = (weight.codes, weight.scales, weight.bias, weight.basis, weight.residual)
    layer: _Layer | None = decoded_cache.find(held)
    if layer is None:
        nbytes = 4 * weight.n * weight.width
        if weight.basis is not None and weight.scheme.transform.decodes:
            nbytes += 4 * weight.basis.numel()
        layer = decoded_cache.get(held, nbytes, lambda: _made(weight, weight.operand())) or _made(weight, None)
    return layer


def _made(weight: PackedWeight, operand: Tensor | None) -> _Layer:
    basis, transform = weight.basis, weight.scheme.transform
    bias = None if weight.bias is None else weight.bias.float()
    if basis is not None and transform.decodes:
        stored, kept = basis, None
        if operand is None:
            kept = decoded_cache.get((stored,), 4 * stored.numel(), lambda: transform.decode(stored))
        basis = transform.decode(stored) if kept is None else kept
    return _Layer(operand, basis, value_key(weight.basis), bias, weight.blocks)


CPU = register_backend(
    Backend(
        "cpu",
        "cpu",
        "the tensors are on the CPU",
        lambda call: None,
        lambda x, w, placement: linear(x, w),
        few_rows=True,
    )
)
