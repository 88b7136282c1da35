"""The CPU path of a quantized layer, in float32: decoded weight (cached up to a limit), quantized input (shared by the
layers that read it), F.linear.

float32 because it is several times faster than bfloat16 on processors without matrix extensions, and because it is then
the fake-quant reference itself, up to the accumulation order of the product.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ptq import formats
from ptq.runtime.cache import from_environment
from ptq.runtime.sharing import shared_input
from ptq.runtime.spec import QuantSpec
from ptq.scheme import decode_blocks

TILE_BYTES = 64 * 2**20
"""Decoded float32 bytes of one tile of output rows where the whole weight is not cached."""

decoded_cache = from_environment()


def linear(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, basis: Tensor | None, spec: QuantSpec
) -> Tensor:
    """x [..., K] of any float dtype -> [..., N] in the same dtype.

    Args:
        weight_packed, weight_scale: as in a checkpoint. bias: any float [N]. basis: as `spec` says.
    """
    quantized = shared_input(x, basis, spec, lambda: spec.quantize_input(x, _decoded_basis(basis, spec)))
    bias = None if bias is None else bias.float()
    n, k = weight_packed.shape[0], weight_packed.shape[1] * 2
    codes = (weight_packed, weight_scale)
    weight = decoded_cache.get(codes, 4 * n * k, lambda: decode(*codes, spec.format))
    if weight is not None:
        return F.linear(quantized, weight, bias).to(x.dtype)
    output = quantized.new_empty(*x.shape[:-1], n)
    rows = max(1, TILE_BYTES // (4 * k))
    for start in range(0, n, rows):
        tile = slice(start, min(start + rows, n))
        weight = decode(weight_packed[tile], weight_scale[tile], spec.format)
        output[..., tile] = F.linear(quantized, weight, None if bias is None else bias[tile])
    return output.to(x.dtype)


def _decoded_basis(basis: Tensor | None, spec: QuantSpec) -> Tensor | None:
    """Learned blocks in float32, from the cache where they fit; any other basis as it is."""
    if basis is None or not spec.learned:
        return basis
    decoded = decoded_cache.get((basis,), 4 * basis.numel(), lambda: decode_blocks(basis))
    return decode_blocks(basis) if decoded is None else decoded


def decode(weight_packed: Tensor, weight_scale: Tensor, format_name: str) -> Tensor:
    """Packed codes -> exact float32 values [N, K]."""
    fmt = formats.get(format_name)
    return fmt.dequantize(fmt.unpack(weight_packed, weight_scale))
