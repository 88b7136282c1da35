"""MXFP4 x MXFP4 on block-scaled tensor cores (sm_100, sm_120): packed activations times a packed weight.

`tl.dot_scaled` with two e2m1 operands becomes tcgen05 kind::mxf4 block scaling on sm_100 and mma.sync kind::mxf4nvf4 on
sm_120: nothing is expanded, both operands stay at 4.25 bits. On sm_90 the same code would be emulated in bfloat16, so
the backend does not offer it there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq.runtime.kernels import blocks as b
from ptq.runtime.kernels.gemm_fp8 import tile_origin
from ptq.runtime.kernels.tiles import Tile, tile_for


def gemm_dot_scaled(
    a_packed: Tensor,
    a_scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Y [M, N] = decode(a) @ decode(weight).T + bias.

    Args:
        a_packed, weight_packed: uint8 [M, K/2] and [N, K/2] contiguous. a_scale, weight_scale: uint8 [., K/32].
        bias: any float [N] or None. out_dtype: bfloat16, float16 or float32. tile: overrides the table.
    """
    (m, half_k), n = a_packed.shape, weight_packed.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a_packed.device)
    if m == 0:
        return out
    tile = tile or tile_for("gemm_dot_scaled", a_packed.device, m, n, 2 * half_k)
    a_desc = TensorDescriptor.from_tensor(a_packed, [tile.m, tile.k // 2])
    w_desc = TensorDescriptor.from_tensor(weight_packed, [tile.n, tile.k // 2])
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    arguments = (a_desc, a_scale, w_desc, weight_scale, out, bias, m, n)
    gemm_dot_scaled_kernel[grid](*arguments, **constants(tile, 2 * half_k), **tile.options)
    return out


def constants(tile: Tile, k: int) -> dict[str, object]:
    """Compile-time arguments of `gemm_dot_scaled_kernel`."""
    return {"K": k, "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group}


@triton.jit
def gemm_dot_scaled_kernel(
    a_desc,
    a_scale_ptr,
    w_desc,
    w_scale_ptr,
    out_ptr,
    bias_ptr,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One output tile. The descriptors pad K with zero codes; scales beyond K are read as 2^-127."""
    start_m, start_n = tile_origin(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), BM, BN, GROUP)
    row = start_m + tl.arange(0, BM)
    column = start_n + tl.arange(0, BN)
    block = tl.arange(0, BK // 32)
    a_scale_at = a_scale_ptr + row.to(tl.int64)[:, None] * (K // 32) + block[None, :]
    w_scale_at = w_scale_ptr + column.to(tl.int64)[:, None] * (K // 32) + block[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        inside = (block < K // 32 - k // 32)[None, :]
        a_scale = tl.load(a_scale_at + k // 32, mask=(row < M)[:, None] & inside, other=0)
        w_scale = tl.load(w_scale_at + k // 32, mask=(column < N)[:, None] & inside, other=0)
        a = a_desc.load([start_m, k // 2])
        w = w_desc.load([start_n, k // 2])
        total = tl.dot_scaled(a, a_scale, "e2m1", w.T, w_scale, "e2m1", total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    offset = row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out_ptr + offset, b.cast_output(total, out_ptr.dtype.element_ty), mask=inside)
