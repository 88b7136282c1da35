"""FP8 matrix product Y = (A W^T) * 2^e + bias: persistent programs, TMA descriptors, float32 accumulation.

A is e5m2 (quantized activations), W is e4m3 or e5m2 (an expanded weight), each MXFP4 values times a power of two, so
every product is exact and the result differs from the float32 reference by accumulation alone. Hopper's FP8 units keep
about 14 bits of the running sum; where sums are to be exact, `scaled-mm` of `ptq.runtime.gpu` is the backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq.runtime.kernels import blocks as b
from ptq.runtime.kernels.tiles import Tile, multiprocessors, tile_for


def gemm_fp8(
    a: Tensor,
    w: Tensor,
    exponent: int,
    row_exponents: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Y [M, N] = (a @ w.T) * 2^(exponent + row_exponents) + bias.

    Args:
        a: float8_e5m2 [M, K] contiguous, K a multiple of 16. w: float8_e4m3fn or float8_e5m2 [N, K] contiguous.
        exponent: of the whole product. row_exponents: int32 [N] or None. bias: any float [N] or None.
        out_dtype: bfloat16, float16 or float32.
        tile: overrides the checked-in table.
    """
    (m, k), n = a.shape, w.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if m == 0:
        return out
    tile = tile or tile_for("gemm_fp8", a.device, m, n, k)
    a_desc = TensorDescriptor.from_tensor(a, [tile.m, tile.k])
    w_desc = TensorDescriptor.from_tensor(w, [tile.n, tile.k])
    programs = min(multiprocessors(a.device), triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n))
    arguments = (a_desc, w_desc, out, bias, row_exponents, 2.0**exponent, m, n)
    gemm_fp8_kernel[(programs,)](*arguments, **constants(tile, k), **tile.options)
    return out


def constants(tile: Tile, k: int) -> dict[str, object]:
    """Compile-time arguments of `gemm_fp8_kernel`."""
    return {"K": k, "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group}


@triton.jit
def gemm_fp8_kernel(
    a_desc,
    w_desc,
    out_ptr,
    bias_ptr,
    row_exponents_ptr,
    factor,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program takes every num_programs-th output tile, in an order that reuses tiles of A in the L2 cache."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        start_m, start_n = tile_origin(tile, tiles_m, tiles_n, BM, BN, GROUP)
        total = product_tile(a_desc, w_desc, start_m, start_n, K, BM, BN, BK)
        row = start_m + tl.arange(0, BM)
        column = start_n + tl.arange(0, BN)
        y = epilogue(total * factor, column, N, bias_ptr, row_exponents_ptr)
        offset = row.to(tl.int64)[:, None] * N + column[None, :]
        inside = (row < M)[:, None] & (column < N)[None, :]
        tl.store(out_ptr + offset, b.cast_output(y, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_origin(tile, tiles_m, tiles_n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tile number -> (first row, first column), walking GROUP row tiles before the next column tile."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inner = tile % per_group
    return (first + inner % height) * BM, (inner // height) * BN


@triton.jit
def product_tile(
    a_desc, w_desc, start_m, start_n,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A[start_m:, :] @ W[start_n:, :].T as float32 [BM, BN]."""
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = a_desc.load([start_m, k])
        w = w_desc.load([start_n, k])
        total = b.dot_f32(a, w.T, total)
    return total


@triton.jit
def epilogue(y, column, N, bias_ptr, row_exponents_ptr):
    """Row factors and bias of the given output columns, where present."""
    if row_exponents_ptr is not None:
        exponent = tl.load(row_exponents_ptr + column, mask=column < N, other=0)
        y = y * b.power_of_two(exponent)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return y
