"""The second word of residual blocks (`ptq.scheme.residual`), written behind the row that `quantize` writes.

A kernel of its own, launched after that of the row: it computes Q(x') of its blocks again. They are a few columns, while one
kernel for both would make every column wait for its residual.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.known import RESIDUAL_BLOCK
from ptq.runtime.kernels import blocks as b
from ptq.runtime.kernels import formats as f

RESIDUAL_SIZE = tl.constexpr(RESIDUAL_BLOCK)


@functools.lru_cache(maxsize=1024)
def parts_of(residual: tuple[int, ...], unit: int, device: torch.device) -> Tensor:
    """Residual blocks -> numbers of the parts of rows that programs of `residual_kernel` take, int32 on the device: blocks, or
    units where these are shorter."""
    parts = max(RESIDUAL_BLOCK // unit, 1)
    numbers = [block * parts + part for block in residual for part in range(parts)]
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@triton.jit
def residual_kernel(
    x_ptr,
    basis_ptr,
    parts_ptr,
    values_ptr,
    scales_ptr,
    counters_ptr,
    M,
    stride_m,
    width,
    K: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT: tl.constexpr,
    ROTATION: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    RULE: tl.constexpr,
    E_REF: tl.constexpr,
):
    """The residual of one part of STEPS tiles of rows, behind the K elements of their output; `parts_of` numbers the parts.

    A part has L elements, or 64 of a unit of more; of a learned block only its own columns are computed. Arguments are those of
    `quantize_kernel`.
    """
    SIZE: tl.constexpr = L if L < RESIDUAL_SIZE else RESIDUAL_SIZE
    count = width - K
    position = tl.program_id(0) % (count // SIZE)
    first = (tl.program_id(0) // (count // SIZE)) * (ROWS * STEPS)
    part = tl.load(parts_ptr + position)
    target = K + position * SIZE
    if BLOCK > 0:
        start = part * SIZE // BLOCK * BLOCK
        block = b.load_block(basis_ptr + start * BLOCK + (part * SIZE - start), BLOCK, DEPTH, SIZE)
        column = start + tl.arange(0, DEPTH)[None, :]
    else:
        column = part * SIZE // L * L + tl.arange(0, L)[None, :]
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row < M
        at = x_ptr + row.to(tl.int64)[:, None] * stride_m + column
        if BLOCK > 0:
            x = b.multiply_block(at, inside[:, None], block, BLOCK, DEPTH, PARTS)
        else:
            x = tl.load(at, mask=inside[:, None], other=0.0)
        if BLOCK == 0 and basis_ptr is not None:
            x = x.to(tl.float32) * tl.load(basis_ptr + column, mask=inside[:, None], other=0.0).to(tl.float32)
        if ROTATION > 0:
            x = b.rotate(x, ROTATION, FACTOR, PARTS)
        x = x.to(tl.float32)
        if BLOCK == 0 and L > SIZE:
            own = (tl.arange(0, L // SIZE) == part % (L // SIZE))[None, :, None]
            x = tl.sum(tl.where(own, tl.reshape(x, (ROWS, L // SIZE, SIZE)), 0.0), 1)
        rest = x - f.round_tile(x, FORMAT, SIZE, ROWS, RULE)
        before = row.to(tl.int64) * width + target
        f.store_tile(
            rest, before, before[:, None] + tl.arange(0, SIZE)[None, :], inside, values_ptr, scales_ptr, counters_ptr,
            FORMAT, SIZE, ROWS, OUT, RULE, E_REF,
        )  # fmt: skip
