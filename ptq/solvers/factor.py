"""The factorisation of a Hessian that `gptq` needs, made once for all Linears that share an input.

GPTQ (arXiv 2210.17323) rounds columns in order and pushes each error onto the columns still to come, with coefficients
from the upper Cholesky factor of H^-1. The same coefficients come straight from the factor H = U U^T with U upper
triangular: column k is rounded from w_k + sum_{i<k} (w_i - q_i) U_ik / U_kk (the LDL form of QuIP, arXiv 2307.13304,
theorem 6). That form is used here: no inverse is ever formed, so it costs a third of the usual three factorisations, is
better conditioned, and holds one K x K matrix.

A Hessian that cannot be factorised is damped ten times more and tried again, counted; past MAX_DAMPING it is an error.
It is never replaced by the identity, which would be plain rounding under the name of GPTQ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.solvers.stats import SolverError

RETRY_FACTOR = 10.0
"""Damping grows by this with every retry."""
FIRST_RETRY = 1e-4
"""Damping of the first retry where the requested damping was zero."""
MAX_DAMPING = 10.0
"""Fraction of the mean diagonal above which a Hessian is not a Hessian (a sum of x x^T plus this is far from singular)."""


@dataclass(frozen=True)
class Factor:
    """H (damped, columns reordered) = U U^T, U upper triangular.

    Attributes:
        order: int64 [K], the column rounded at each position.
        feedback_kk: float [K, K], entry [k, i] = U_ik / U_kk for positions i < k; 1 on
            the diagonal, zero above it.
        pivots_k: float [K], U_kk^2 by position: what an error in that column costs once later columns have compensated.
        added_k: float [K], what was added to the diagonal of H by position: damping, and a pivot for columns that have none.
        damping: the fraction of the mean diagonal that was added in the end.
        damping_retries: how many times it had to be raised.
        dead_columns: channels that were zero in every calibration token.
    """

    order: Tensor
    feedback_kk: Tensor
    pivots_k: Tensor
    added_k: Tensor
    damping: float
    damping_retries: int
    dead_columns: int


def factorize(h_kk: Tensor, *, damping: float, act_order: bool, dtype: torch.dtype = torch.float32) -> Factor:
    """Factorise a Hessian float [K, K] of inputs in the basis of the weight.

    Args:
        damping: fraction of the mean diagonal (over live columns) added to the diagonal.
        act_order: order columns by descending diagonal (stable), else left to right.
        dtype: float32 or float64, of the factorisation and of the result.

    Raises:
        SolverError: a NaN or infinity in H, a negative diagonal, or no factorisation up to MAX_DAMPING.
    """
    check_hessian(h_kk)
    if damping < 0:
        raise SolverError(f"Damping is a fraction of the mean diagonal and cannot be negative, found {damping:g}.")
    diagonal = h_kk.diagonal()
    dead = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else _natural(h_kk)
    # Reversing rows and columns turns the lower Cholesky factor into the upper one.
    reverse = order.flip(0)
    h = h_kk.to(dtype)[reverse][:, reverse]
    live = int((~dead).sum())
    mean = float(diagonal.double().sum()) / max(live, 1)
    # A dead column is decoupled from all others, up to rounding: an average pivot and exact zeros keep it so.
    if live < len(h):
        h[dead[reverse]] = 0
        h[:, dead[reverse]] = 0
    missing = dead[reverse].to(dtype) * (mean or 1.0)
    h.diagonal().add_(missing)
    original = h.diagonal().clone()
    retries = 0
    while True:
        h.diagonal().copy_(original + damping * mean)
        upper, info = torch.linalg.cholesky_ex(h, upper=True)
        if int(info) == 0 and bool(torch.isfinite(upper.diagonal()).all()):
            break
        damping, retries = damping * RETRY_FACTOR or FIRST_RETRY, retries + 1
        if damping > MAX_DAMPING:
            raise SolverError(
                f"The Hessian [{len(h)}, {len(h)}] has no Cholesky factor even with damping {damping / RETRY_FACTOR:g} of its mean diagonal ({retries} retries), so it is not a sum of x x^T. Record the calibration inputs again, or round this layer to nearest explicitly."
            )
    del h
    feedback = upper.flip(0, 1)
    del upper
    pivots = feedback.diagonal().clone()
    feedback /= pivots.unsqueeze(-1)
    added = missing.flip(0) + damping * mean
    return Factor(order, feedback, pivots.square(), added, damping, retries, len(diagonal) - live)


def _natural(h_kk: Tensor) -> Tensor:
    return torch.arange(len(h_kk), device=h_kk.device)


def check_hessian(h_kk: Tensor) -> None:
    """Raise SolverError unless `h_kk` is square and finite with a diagonal that is not negative."""
    if h_kk.dim() != 2 or h_kk.shape[0] != h_kk.shape[1]:
        raise SolverError(f"A Hessian is square [K, K], found shape {list(h_kk.shape)}.")
    # The sum is finite only if all entries are (or the sum itself overflows, which is as unusable).
    if not math.isfinite(h_kk.sum(dtype=torch.float64)):
        raise SolverError(
            "The Hessian holds NaN or infinite values: the layer's calibration inputs were not finite. Check the calibration records and the blocks before this layer."
        )
    if bool((h_kk.diagonal() < 0).any()):
        raise SolverError("The Hessian has a negative diagonal entry, so it is not a sum of x x^T.")
