"""The CPU path of a quantized layer, in float32: decoded weight (cached up to a limit), quantized input (shared by the
layers that read it), F.linear.

float32 because it is several times faster than bfloat16 on processors without matrix extensions, and because it is then
the fake-quant reference itself, up to the accumulation order of the product.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ptq.runtime.backends import Backend, register_backend
from ptq.runtime.cache import from_environment
from ptq.runtime.last_input import shared_input
from ptq.runtime.weight import PackedWeight

TILE_BYTES = 64 * 2**20
"""Decoded float32 bytes of one tile of output rows where the whole weight is not cached."""

decoded_cache = from_environment()


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [..., K] of any float dtype -> [..., N] in the same dtype."""
    scheme = weight.scheme
    blocks = weight.blocks
    quantized = shared_input(
        x, weight.basis, (scheme, blocks), lambda: scheme.quantize_input(x, _decoded_basis(weight), blocks)
    )
    bias = None if weight.bias is None else weight.bias.float()
    n, k = weight.n, weight.width
    stored = (weight.codes, weight.scales)
    stored += () if weight.residual is None else (weight.residual,)
    decoded = decoded_cache.get(stored, 4 * n * k, weight.operand)
    if decoded is not None:
        return F.linear(quantized, decoded, bias).to(x.dtype)
    output = quantized.new_empty(*x.shape[:-1], n)
    rows = max(1, TILE_BYTES // (4 * k))
    for start in range(0, n, rows):
        tile = slice(start, min(start + rows, n))
        output[..., tile] = F.linear(quantized, weight.operand(tile), None if bias is None else bias[tile])
    return output.to(x.dtype)


def _decoded_basis(weight: PackedWeight) -> Tensor | None:
    """The basis as it is computed with, from the cache where that is worth it and fits."""
    basis, transform = weight.basis, weight.scheme.transform
    if basis is None or not transform.decodes:
        return basis
    decoded = decoded_cache.get((basis,), 4 * basis.numel(), lambda: transform.decode(basis))
    return transform.decode(basis) if decoded is None else decoded


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
