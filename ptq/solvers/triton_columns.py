"""The columns of one lazy block of GPTQ on a GPU: one launch a block instead of a dozen a column.

Rows of the weight are independent: a program takes some of them, keeps their errors in registers and walks the columns.
Codes are those of `ptq.solvers.gptq.round_block` up to the order of its sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.solvers.grid import Grid

ROWS = 32
"""Rows of the weight a program."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""An error is what decoding the code gives, so the product and the difference are rounded apart."""


def round_block(target_cn: Tensor, weight_cn: Tensor, steps_cn: Tensor, feedback_cc: Tensor, grid: Grid) -> Tensor:
    """As `ptq.solvers.gptq.round_block`, of contiguous tensors on a GPU, with the grid in place of the format."""
    columns, n = weight_cn.shape
    elements = torch.empty(weight_cn.shape, dtype=torch.uint8, device=weight_cn.device)
    feedback_cc = feedback_cc.contiguous()
    round_columns_kernel[(triton.cdiv(n, ROWS),)](
        target_cn,
        weight_cn,
        steps_cn,
        feedback_cc,
        grid.thresholds,
        grid.levels,
        elements,
        n,
        columns,
        COLUMNS=triton.next_power_of_2(columns),
        ROWS=ROWS,
        **OPTIONS,
    )
    return elements


@triton.jit
def round_columns_kernel(
    target_ptr,
    weight_ptr,
    steps_ptr,
    feedback_ptr,
    thresholds_ptr,
    levels_ptr,
    elements_ptr,
    n,
    columns,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    before = tl.arange(0, COLUMNS)
    errors = tl.zeros((COLUMNS, ROWS), dtype=weight_ptr.dtype.element_ty)
    for i in range(columns):
        at = i * n + rows
        feedback = tl.load(feedback_ptr + i * columns + before, mask=before < i, other=0.0)
        x = tl.load(target_ptr + at, mask=inside, other=0.0) + tl.sum(feedback[:, None] * errors, axis=0)
        target = x
        x = x.to(tl.float32)
        step = tl.load(steps_ptr + at, mask=inside, other=1.0)
        y = tl.div_rn(tl.abs(x), step)
        level = tl.zeros((ROWS,), dtype=tl.float32) + tl.load(levels_ptr)
        index = tl.zeros((ROWS,), dtype=tl.int32)
        for j in tl.static_range(7):
            reached = y >= tl.load(thresholds_ptr + j)
            level = tl.where(reached, tl.load(levels_ptr + j + 1), level)
            index += reached.to(tl.int32)
        negative = (x < 0) & (index > 0)
        tl.store(elements_ptr + at, (index | tl.where(negative, 8, 0)).to(tl.uint8), mask=inside)
        value = tl.where(negative, -level, level) * step
        error = tl.load(weight_ptr + at, mask=inside, other=0.0) - value
        tl.store(weight_ptr + at, error, mask=inside)
        tl.store(steps_ptr + at, (target - value).to(tl.float32), mask=inside)
        errors = tl.where((before == i)[:, None], error[None, :], errors)
