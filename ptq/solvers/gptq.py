"""GPTQ on a block format whose group scales are already fixed (static groups).

Columns are rounded in the order of the factor; every column keeps the step of its own group, so reordering columns does
not mix groups. The codes are final and packing never re-rounds. Feedback is gathered lazily: one matrix product a block of
columns from all blocks before, and inside the block `round_block` walks the columns. Left-looking, so a weight is read
once; its error takes its place.

`round_block` is the definition; a CPU runs `native_columns` and a GPU `triton_columns` in its place, with the thresholds
and levels of the format (`grid`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.scheme import Codes, Format, native
from ptq.solvers.factor import Factor
from ptq.solvers.grid import grid_of
from ptq.solvers.rtn import check_weight
from ptq.solvers.stats import SolverError

RoundBlock = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(target, weight, steps, feedback) -> elements, see `round_block`."""


@dataclass(frozen=True)
class Rounding:
    """A rounded weight and what it costs.

    Attributes:
        codes: of the weight [N, K].
        trace_n: diag(E H E^T) of E = decoded - weight, float64 [N]: the squared output error of each row over the tokens in H.
        error_n: squared error of each row of the weight, float64 [N].
    """

    codes: Codes
    trace_n: Tensor
    error_n: Tensor


def gptq(w_nk: Tensor, factor: Factor, fmt: Format, *, scales: Tensor, block_columns: int = 128) -> Rounding:
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
    rounded, trace, error = _round_columns(w_nk, steps, factor, fmt, block_columns)
    elements = torch.empty((k, n), dtype=torch.uint8, device=w_nk.device)
    elements[factor.order] = rounded
    return Rounding(Codes(elements.T.contiguous(), scales), trace, error)


def rounded_from(w_nk: Tensor, codes: Codes, factor: Factor, fmt: Format) -> Tensor:
    """What `gptq` rounded to these codes: the weight and all that was pushed onto each column, float32 [N, K].

    One product, from the errors that the codes tell.
    """
    errors = (w_nk - fmt.dequantize(codes))[:, factor.order].to(factor.feedback_kk.dtype)
    target = w_nk.float().clone()
    target[:, factor.order] += (errors @ factor.feedback_kk.tril(-1).T).float()
    return target


def _round_columns(
    w_nk: Tensor, steps_nk: Tensor, factor: Factor, fmt: Format, block_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Elements uint8 [K, N] in the factor's column order, and the two errors of `Rounding`."""
    feedback = factor.feedback_kk
    # Columns become rows, so that each one is contiguous.
    weight = w_nk.T.contiguous()[factor.order].to(feedback.dtype)
    steps = steps_nk.T.contiguous()[factor.order]
    run = _implementation(weight, fmt)
    elements = []
    start = 0
    for block in zip(*(whole.split(block_columns) for whole in (weight, steps, feedback)), strict=True):
        part, part_steps, onto = block
        stop = start + len(part)
        target = torch.addmm(part, onto[:, :start], weight[:start])  # there errors are in place of what was rounded
        elements.append(run(target, part, part_steps, onto[:, start:stop]))
        start = stop
    # With H + D = U U^T, e (H + D) e^T = |e U|^2, and (e U)_k = U_kk (target_k - value_k): what was rounded away, times a pivot.
    squares, errors = steps.square_(), weight.square_()
    trace = factor.pivots_k.to(squares.dtype) @ squares
    trace = trace.double() - factor.added_k.to(errors.dtype) @ errors
    return torch.cat(elements), trace.clamp_(min=0), errors.sum(0).double()


def _implementation(weight: Tensor, fmt: Format) -> RoundBlock:
    """The compiled loop of the device of `weight`; the eager one where there is none, or the format has no grid."""
    grid = grid_of(fmt)
    if grid is not None and native.takes(weight):
        from ptq.solvers import native_columns

        return functools.partial(native_columns.round_block, grid=grid)
    if grid is not None and weight.is_cuda and importlib.util.find_spec("triton"):  # it exists on Linux only
        from ptq.solvers import triton_columns

        return functools.partial(triton_columns.round_block, grid=grid.to(weight.device))
    return functools.partial(round_block, fmt=fmt)


def round_block(target_cn: Tensor, weight_cn: Tensor, steps_cn: Tensor, feedback_cc: Tensor, fmt: Format) -> Tensor:
    """Round a block of columns, feeding each error forward to the columns behind it.

    Args:
        target_cn: float [C, N], what each column is rounded from, without the feedback inside the block; used up.
        weight_cn: float [C, N]; becomes the errors.
        steps_cn: float32 [C, N]; becomes what was rounded away, the target with all feedback minus the value.
        feedback_cc: float [C, C], entry [k, i] of column i on column k > i.

    Returns:
        Elements uint8 [C, N].
    """
    elements = torch.empty(weight_cn.shape, dtype=torch.uint8, device=weight_cn.device)
    for column, (row, steps) in enumerate(zip(target_cn, steps_cn, strict=True)):
        # The grid is defined in float32, for a float64 factor too.
        elements[column] = fmt.encode(row.float(), steps)
        value = fmt.decode(elements[column], steps)
        weight_cn[column] -= value
        steps_cn[column] = row - value
        target_cn[column + 1 :] += feedback_cc[column + 1 :, column, None] * weight_cn[column]
    return elements
