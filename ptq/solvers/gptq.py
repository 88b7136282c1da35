"""GPTQ on a block format whose group scales are already fixed (static groups).

Columns are rounded in the order of the factor; every column keeps the step of its own group, so reordering columns does
not mix groups. Rounding goes through `Format.encode` with those steps: the codes are final and packing never re-rounds.
Feedback is gathered lazily: one matrix product a block of columns from all blocks before, one vector product a column
inside the block. Left-looking, so the weight is read once and never rewritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.scheme import Codes, Format
from ptq.solvers.factor import Factor
from ptq.solvers.rtn import check_weight
from ptq.solvers.stats import SolverError


def gptq(w_nk: Tensor, factor: Factor, fmt: Format, *, scales: Tensor, block_columns: int = 128) -> Codes:
    """Round a weight so that its output error on the calibration inputs is small.

    Args:
        w_nk: float [N, K], in the basis. Rows are independent: stack Linears that share an input.
        factor: of the Hessian of the inputs in the same basis; sums are in its dtype.
        scales: [N, K / group] in the format's stored layout, from `round_to_nearest` or `search_scales`.
        block_columns: columns a lazy block; changes speed, and codes only through the order of floating-point sums.

    Raises:
        SolverError: a non-finite weight, shapes that do not fit.
        FormatError: scales that do not belong to a weight of this shape.
    """
    check_weight(w_nk)
    n, k = w_nk.shape
    if len(factor.order) != k:
        raise SolverError(f"The weight has {k} input channels and the Hessian {len(factor.order)}.")
    steps = fmt.steps(scales)
    if steps.shape != w_nk.shape:
        raise SolverError(f"Scales {list(scales.shape)} do not fit a {fmt.name} weight {list(w_nk.shape)}.")
    rounded = _round_columns(w_nk, steps, factor, fmt, block_columns)
    elements = torch.empty((k, n), dtype=torch.uint8, device=w_nk.device)
    elements[factor.order] = rounded
    return Codes(elements.T.contiguous(), scales)


def _round_columns(w_nk: Tensor, steps_nk: Tensor, factor: Factor, fmt: Format, block_columns: int) -> Tensor:
    """Elements uint8 [K, N] in the factor's column order."""
    # Columns become rows, so that each one is contiguous.
    weight = w_nk.T.contiguous()[factor.order].to(factor.feedback_kk.dtype)
    steps = steps_nk.T.contiguous()[factor.order]
    elements = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(weight)
    for start in range(0, len(weight), block_columns):
        stop = min(start + block_columns, len(weight))
        target = weight[start:stop] + factor.feedback_kk[start:stop, :start] @ errors[:start]
        for column in range(start, stop):
            row = target[column - start]
            if column > start:
                row = row + factor.feedback_kk[column, start:column] @ errors[start:column]
            # The grid is defined in float32, for a float64 factor too.
            elements[column] = fmt.encode(row.float(), steps[column])
            errors[column] = weight[column] - fmt.decode(elements[column], steps[column])
    return elements
