"""Rows times learned blocks, compiled by numba: the product of `ptq.scheme.learned.transform_input` for few rows.

A batched product of torch costs more in calls, copies and scratch than its arithmetic when rows are few, as in a layer of a
small model. Every output is one chain of fused multiply-adds over the channels of its block in ascending order, which is
what MKL computes too: the same bits, so the same codes.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ptq.scheme import native

SIZES = (64, 128)
"""Of the blocks: compile-time constants, each with a loop of its own. Others are left to torch."""
ROWS = range(16, 257)
"""With fewer rows MKL sums in another order; with more torch's product is as fast."""


def takes(x: Tensor, blocks_gbb: Tensor) -> bool:
    """Whether `change` is for these: float32 in CPU memory, ROWS rows, blocks of one of SIZES that fit."""
    return (
        x.dtype == blocks_gbb.dtype == torch.float32
        and fits(x.numel() // x.shape[-1], blocks_gbb.shape[1])
        and blocks_gbb.shape[0] * blocks_gbb.shape[1] == x.shape[-1]
        and native.takes(x)
        and native.takes(blocks_gbb)
    )


def fits(rows: int, size: int) -> bool:
    """Whether so many rows and blocks of this size are multiplied faster here."""
    return size in SIZES and rows in ROWS


def change(x: Tensor, blocks_gbb: Tensor) -> Tensor:
    """x float32 [..., K] @ A, float32 [G, B, B] with G * B = K -> float32 [..., K]."""
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    k, blocks = x.shape[-1], blocks_gbb.detach().contiguous().numpy()
    rows, changed = x.numpy().reshape(-1, k), out.numpy().reshape(-1, k)
    if native.is_compiled(multiply, x.dtype):
        multiply(rows, blocks, changed)
    else:
        native.in_parts(
            multiply, x.dtype, len(rows), len(rows), lambda part: multiply(rows[part], blocks, changed[part])
        )
    return out


@native.kernel
def multiply(x, blocks, out):
    """x [M, K] times blocks [G, B, B] into out [M, K], B one of SIZES."""
    if blocks.shape[1] == 64:
        _multiply_64(x, blocks, out, np.empty((2, 64), np.float32))
    else:
        _multiply_128(x, blocks, out, np.empty((2, 128), np.float32))


def _product(size):
    @njit(error_model="numpy", fastmath={"contract"})
    def product(x, blocks, out, sums):
        """Two rows at a time, so that a block's entries are read once for both; four channels, so that sums stay in registers."""
        last = len(x) - 1
        for g in range(len(blocks)):
            start = g * size
            for i in range(0, len(x), 2):
                j = min(i + 1, last)
                for n in range(size):
                    sums[0, n] = np.float32(0.0)
                    sums[1, n] = np.float32(0.0)
                for k in range(0, size, 4):
                    a0, b0 = x[i, start + k], x[j, start + k]
                    a1, b1 = x[i, start + k + 1], x[j, start + k + 1]
                    a2, b2 = x[i, start + k + 2], x[j, start + k + 2]
                    a3, b3 = x[i, start + k + 3], x[j, start + k + 3]
                    for n in range(size):
                        w0, w1 = blocks[g, k, n], blocks[g, k + 1, n]
                        w2, w3 = blocks[g, k + 2, n], blocks[g, k + 3, n]
                        sums[0, n] = (((sums[0, n] + a0 * w0) + a1 * w1) + a2 * w2) + a3 * w3
                        sums[1, n] = (((sums[1, n] + b0 * w0) + b1 * w1) + b2 * w2) + b3 * w3
                for n in range(size):
                    out[i, start + n] = sums[0, n]
                    out[j, start + n] = sums[1, n]

    return product


_multiply_64, _multiply_128 = _product(64), _product(128)
