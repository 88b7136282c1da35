"""Expand a packed weight to the dtype of a matrix product: FP8 where the placement allows it, bfloat16 otherwise.

Done once a layer call into scratch memory. Decoding inside the large product instead would repeat the work for every
row tile and cost more issue slots than the tensor cores leave free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq import formats
from ptq.runtime.exactness import DTYPES, Placement
from ptq.runtime.kernels import blocks as b

TILE_ROWS = 64
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def expand_weight(weight_packed: Tensor, weight_scale: Tensor, format_name: str, placement: Placement) -> Tensor:
    """Packed codes -> [N, K] in the dtype of `placement`, in units of 2^placement.exponent (of each row, if per row).

    Args:
        weight_packed, weight_scale: as in a checkpoint, contiguous; MXFP4 or HiF4.
        placement: from `ptq.runtime.exactness.place`; HiF4 and placement "bf16" give bfloat16 with exponent 0.
    """
    n, k = weight_packed.shape[0], weight_packed.shape[1] * 2
    out = torch.empty((n, k), dtype=DTYPES[placement.kind], device=weight_packed.device)
    tile = tile_length(k)
    grid = (triton.cdiv(n, TILE_ROWS), k // tile)
    arguments = (weight_packed, weight_scale, out, placement.row_exponents, placement.exponent, n)
    expand_kernel[grid](*arguments, HIF4=format_name == "hif4", K=k, L=tile, ROWS=TILE_ROWS, **OPTIONS)
    return out


def expand_weight_reference(
    weight_packed: Tensor, weight_scale: Tensor, format_name: str, placement: Placement
) -> Tensor:
    """The same in torch, from `ptq.scheme`. Exact: every value is representable, or it becomes NaN with its group."""
    fmt = formats.get(format_name)
    values = fmt.dequantize(fmt.unpack(weight_packed, weight_scale)).double()
    exponent = placement.exponent if placement.row_exponents is None else placement.row_exponents.unsqueeze(1)
    return torch.ldexp(values, -torch.as_tensor(exponent, device=values.device)).float().to(DTYPES[placement.kind])


def tile_length(k: int) -> int:
    """Elements of a row in one tile: the largest power of two up to 256 that divides K (K is a multiple of 32)."""
    return min(256, k & -k)


@triton.jit
def expand_kernel(
    packed_ptr,
    scale_ptr,
    out_ptr,
    row_exponents_ptr,
    exponent,
    N,
    HIF4: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of ROWS rows and L columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * L
    inside = (row < N)[:, None]
    base = row.to(tl.int64)[:, None]
    packed = tl.load(packed_ptr + base * (K // 2) + start // 2 + tl.arange(0, L // 2)[None, :], mask=inside, other=0)
    GROUP: tl.constexpr = 64 if HIF4 else 32
    groups = tl.arange(0, L // GROUP)[None, :]
    scales = tl.load(scale_ptr + base * (K // GROUP) + start // GROUP + groups, mask=inside, other=0)
    if row_exponents_ptr is not None:
        exponent = tl.load(row_exponents_ptr + row, mask=row < N, other=0)[:, None]
    value = b.decode_tile(packed, scales, exponent, HIF4)
    offset = base * K + start + tl.arange(0, L)[None, :]
    tl.store(out_ptr + offset, b.cast_output(value, out_ptr.dtype.element_ty), mask=inside)
