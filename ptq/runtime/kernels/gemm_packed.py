"""bfloat16 activations times a packed weight, decoded in registers: for few rows, where reading the weight is the cost.

The weight takes the M side of the tensor-core product, so that one row of activations wastes at most 15 of 16 columns
rather than 63 of 64 rows. Both formats. It is also the reference for the other products: nothing is expanded, nothing
is scaled, only the sum is rounded. For many rows `expand_weight` and a dense product are faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.runtime.kernels import blocks as b
from ptq.runtime.kernels import formats as f
from ptq.runtime.kernels.expand_weight import tile_length
from ptq.runtime.kernels.tiles import Tile, tile_for
from ptq.runtime.weight import PackedWeight
from ptq.scheme import Format


def gemm_packed(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype, *, tile: Tile | None = None) -> Tensor:
    """Y [M, N] = x @ decode(weight).T + bias.

    Args:
        x: bfloat16 [M, K] contiguous, on the format's grid (or any bfloat16 values).
        weight: contiguous codes and scales.
        out_dtype: bfloat16, float16 or float32. tile: overrides the table.
    """
    (m, k), n = x.shape, weight.n
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0:
        return out
    tile = tile or tile_for("gemm_packed", x.device, m, n, k)
    grid = (triton.cdiv(n, tile.n), triton.cdiv(m, tile.m))
    arguments = (x, weight.codes, weight.scales, out, weight.bias, m, n)
    gemm_packed_kernel[grid](*arguments, **constants(tile, weight.scheme.format, k), **tile.options)
    return out


def constants(tile: Tile, fmt: Format, k: int) -> dict[str, object]:
    """Compile-time arguments of `gemm_packed_kernel`."""
    block_k = min(tile.k, tile_length(k))
    return {"FORMAT": fmt.kernel_id, "GROUP": fmt.group_size, "K": k, "BM": tile.m, "BN": tile.n, "BK": block_k}


@triton.jit
def gemm_packed_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    out_ptr,
    bias_ptr,
    M,
    N,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN output features of BM rows."""
    feature = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    has_feature = (feature < N)[:, None]
    has_row = (row < M)[None, :]
    packed_at = packed_ptr + feature.to(tl.int64)[:, None] * (K // 2) + tl.arange(0, BK // 2)[None, :]
    scale_at = scale_ptr + feature.to(tl.int64)[:, None] * (K // GROUP) + tl.arange(0, BK // GROUP)[None, :]
    x_at = x_ptr + row.to(tl.int64)[None, :] * K + tl.arange(0, BK)[:, None]
    total = tl.zeros((BN, BM), tl.float32)
    for k in range(0, K, BK):
        packed = tl.load(packed_at + k // 2, mask=has_feature, other=0)
        scales = tl.load(scale_at + k // GROUP, mask=has_feature, other=0)
        weight = b.cast_output(f.decode_tile(packed, scales, 0, FORMAT), tl.bfloat16)
        x = tl.load(x_at + k, mask=has_row, other=0.0)
        total = b.dot_f32(weight, x, total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + feature, mask=feature < N, other=0.0).to(tl.float32)[:, None]
    offset = row.to(tl.int64)[None, :] * N + feature[:, None]
    tl.store(out_ptr + offset, b.cast_output(total, out_ptr.dtype.element_ty), mask=has_feature & has_row)
