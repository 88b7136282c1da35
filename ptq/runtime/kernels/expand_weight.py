"""Expand a packed weight to the dtype of a matrix product: FP8 where the placement allows it, bfloat16 otherwise.

Done once a layer call into scratch memory. Decoding inside the large product instead would repeat the work for every
row tile and cost more issue slots than the tensor cores leave free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.runtime.kernels import blocks as b
from ptq.runtime.kernels import formats as f
from ptq.runtime.weight import PackedWeight
from ptq.scheme import Format, Placement
from ptq.scheme.placement import DTYPES
from ptq.scheme.residual import columns

TILE_ROWS = 64
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def expand_weight(weight: PackedWeight, placement: Placement) -> Tensor:
    """Packed codes -> [N, width] in the dtype of `placement`, in units of 2^placement.exponent (of each row, if per row).

    Args:
        weight: contiguous codes and scales.
        placement: from `Format.place`; "bf16" gives bfloat16 with exponent 0.
    """
    n, k = weight.n, weight.k
    out = torch.empty((n, weight.width), dtype=DTYPES[placement.kind], device=weight.codes.device)
    tile = tile_length(k)
    grid = (triton.cdiv(n, TILE_ROWS), k // tile)
    arguments = (weight.codes, weight.scales, out, placement.row_exponents, placement.exponent, n, weight.width)
    expand_kernel[grid](*arguments, **constants(weight.scheme.format, k), **OPTIONS)
    if weight.blocks:
        raw = out.view(torch.int16 if out.element_size() == 2 else torch.uint8)  # FP8 is not indexed by every version
        raw[:, k:] = columns(raw[:, :k], weight.blocks)
    return out


def expand_weight_reference(weight: PackedWeight, placement: Placement) -> Tensor:
    """The same in torch, from `ptq.scheme`. Exact: every value is representable, or it becomes NaN with its group."""
    exponent = placement.exponent if placement.row_exponents is None else placement.row_exponents.unsqueeze(1)
    values = weight.operand().double()
    return torch.ldexp(values, -torch.as_tensor(exponent, device=values.device)).float().to(DTYPES[placement.kind])


def constants(fmt: Format, k: int) -> dict[str, object]:
    """Compile-time arguments of `expand_kernel`."""
    return {"FORMAT": fmt.kernel_id, "GROUP": fmt.group_size, "K": k, "L": tile_length(k), "ROWS": TILE_ROWS}


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
    width,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of ROWS rows and L columns. width: of a row of the output, which may go on behind its K elements."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * L
    inside = (row < N)[:, None]
    base = row.to(tl.int64)[:, None]
    packed = tl.load(packed_ptr + base * (K // 2) + start // 2 + tl.arange(0, L // 2)[None, :], mask=inside, other=0)
    groups = tl.arange(0, L // GROUP)[None, :]
    scales = tl.load(scale_ptr + base * (K // GROUP) + start // GROUP + groups, mask=inside, other=0)
    if row_exponents_ptr is not None:
        exponent = tl.load(row_exponents_ptr + row, mask=row < N, other=0)[:, None]
    value = f.decode_tile(packed, scales, exponent, FORMAT)
    offset = base * width + start + tl.arange(0, L)[None, :]
    tl.store(out_ptr + offset, b.cast_output(value, out_ptr.dtype.element_ty), mask=inside)
