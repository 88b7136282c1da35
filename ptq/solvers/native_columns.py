"""The columns of one lazy block of GPTQ on a CPU, compiled by numba: the codes of `ptq.solvers.gptq.round_block`, bit for bit.

Rows of the weight are independent: a thread takes some of them, and holds the targets of a few in the first cache while it
walks the columns. Sums are those of the eager function, in its order; nothing is contracted to fused multiply-adds.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ptq.scheme.native import in_parts, kernel
from ptq.solvers.grid import Grid

ROWS = 64
"""Rows of the weight whose targets are in the cache together: 32 KB in float32."""
PART = 256
"""Rows that a thread takes at a time, about 0.3 ms of work in a block of 128 columns."""
f32, i32 = np.float32, np.int32


def round_block(target_cn: Tensor, weight_cn: Tensor, steps_cn: Tensor, feedback_cc: Tensor, grid: Grid) -> Tensor:
    """As `ptq.solvers.gptq.round_block`, of contiguous tensors on the CPU, with the grid in place of the format."""
    target, weight, steps, feedback = (x.numpy() for x in (target_cn, weight_cn, steps_cn, feedback_cc))
    forward, elements = np.ascontiguousarray(feedback.T), np.empty(weight.shape, np.uint8)

    def run(rows: slice) -> None:
        round_columns(rows.start, rows.stop, target, weight, steps, forward, *grid.arrays, elements)

    in_parts(round_columns, weight_cn.dtype, weight_cn.shape[1], PART, run)
    return torch.from_numpy(elements)


@kernel
def round_columns(first, last, target, weight, steps, feedback, thresholds, levels, elements):
    """Round rows first to last of a block of C columns.

    Args:
        target: float [C, N], what each column is rounded from, without the feedback of this block.
        weight: float [C, N]; becomes the errors.
        steps: float32 [C, N]; becomes what was rounded away. feedback: float [C, C], entry [i, j] of column i on column j > i.
        thresholds, levels: float32 [7] and [8], see `ptq.solvers.grid.Grid`.
        elements: uint8 [C, N], written.
    """
    columns = len(target)
    t0, t1, t2, t3, t4, t5, t6 = thresholds
    l0, l1, l2, l3, l4, l5, l6, l7 = levels
    buffer = np.zeros((columns, ROWS), target.dtype)
    error = np.zeros(ROWS, target.dtype)
    value, index = np.zeros(ROWS, np.float32), np.zeros(ROWS, np.int32)
    step = np.ones(ROWS, np.float32)
    for low in range(first, last, ROWS):
        rows = min(ROWS, last - low)
        for i in range(columns):
            for r in range(rows):
                buffer[i, r] = target[i, low + r]
        for i in range(columns):
            for r in range(rows):
                step[r] = steps[i, low + r]
            # Loops of a known count over these small arrays compile to vector instructions.
            for r in range(ROWS):
                x = f32(buffer[i, r])
                y = abs(x / step[r])
                level = l1 if y >= t0 else l0
                level = l2 if y >= t1 else level
                level = l3 if y >= t2 else level
                level = l4 if y >= t3 else level
                level = l5 if y >= t4 else level
                level = l6 if y >= t5 else level
                level = l7 if y >= t6 else level
                reached = i32(y >= t0) + i32(y >= t1) + i32(y >= t2) + i32(y >= t3)
                reached += i32(y >= t4) + i32(y >= t5) + i32(y >= t6)
                negative = (x < f32(0.0)) & (y >= t0)
                value[r] = f32(-level if negative else level) * step[r]
                index[r] = i32(reached | (i32(8) if negative else i32(0)))
            for r in range(rows):
                elements[i, low + r] = index[r]
                steps[i, low + r] = buffer[i, r] - value[r]
                error[r] = weight[i, low + r] - value[r]
                weight[i, low + r] = error[r]
            for j in range(i + 1, columns):
                factor = feedback[i, j]
                for r in range(ROWS):
                    buffer[j, r] += factor * error[r]
