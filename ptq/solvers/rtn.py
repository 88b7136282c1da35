"""Round to nearest: the baseline, and the rounding of a weight on scales that are already chosen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptq.scheme import Codes, Format
from ptq.solvers.conversion import DEFINITION, Conversion
from ptq.solvers.stats import SolverError


def round_to_nearest(
    w_nk: Tensor, fmt: Format, *, scale_rule: str | None = None, conversion: Conversion = DEFINITION
) -> Codes:
    """The format's own conversion of a weight, float [N, K]: the baseline every solver is compared with.

    Raises:
        SolverError: the weight holds a NaN or an infinity.
        FormatError: K is not a multiple of the group, unknown scale rule.
    """
    check_weight(w_nk)
    return conversion.weight(w_nk.float(), fmt, scale_rule)


def round_to_scales(w_nk: Tensor, scales: Tensor, fmt: Format) -> Codes:
    """Nearest codes of float [N, K] under given scales (the format's stored layout).

    On the scales of `round_to_nearest` this gives the same codes for MXFP4. HiF4's reference conversion multiplies by
    a bfloat16 reciprocal and so rounds about one element in a hundred away from its nearest level; this function does
    not.
    """
    check_weight(w_nk)
    w_nk = w_nk.float()
    return Codes(fmt.encode(w_nk, fmt.steps(scales)), scales)


def check_weight(w_nk: Tensor) -> None:
    """Raise SolverError unless `w_nk` is a finite matrix."""
    if w_nk.dim() != 2:
        raise SolverError(f"A weight matrix [N, K] is needed, found shape {list(w_nk.shape)}.")
    # The sum is finite only if all entries are: float64 does not overflow on float32.
    if not math.isfinite(w_nk.sum(dtype=torch.float64)):
        bad = int((~torch.isfinite(w_nk)).sum())
        raise SolverError(f"The weight {list(w_nk.shape)} holds {bad} NaN or infinite values and cannot be quantized.")
