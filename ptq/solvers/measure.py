"""How good a quantized weight is: weight SQNR, output error in trace form, output error on tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 1024
"""Rows or columns taken at a time."""


def sqnr_db(w_nk: Tensor, wq_nk: Tensor) -> float | None:
    """10 log10(sum w^2 / sum (w - wq)^2); None where either is zero and there is no such figure."""
    pairs = list(zip(w_nk.split(BLOCK), wq_nk.split(BLOCK), strict=True))  # float64 copies of a few rows, not of all
    error = sum(float((w - wq).double().square().sum()) for w, wq in pairs)
    signal = sum(float(w.double().square().sum()) for w, _ in pairs)
    return 10.0 * math.log10(signal / error) if signal > 0 and error > 0 else None


def trace_errors(e_nk: Tensor, h_kk: Tensor) -> Tensor:
    """diag(E H E^T) as float64 [N]: the squared output error of each row over the tokens in H, never negative.

    H must be symmetric: only its upper block triangle is read, which halves the work.
    """
    total = torch.zeros(len(e_nk), dtype=torch.float64, device=e_nk.device)
    e_nk = e_nk.to(h_kk.dtype)
    for start in range(0, e_nk.shape[1], BLOCK):
        stop = start + BLOCK
        product = e_nk[:, start:stop] @ h_kk[start:stop, start:]
        product[:, BLOCK:] *= 2
        total += (product * e_nk[:, start:]).sum(-1, dtype=torch.float64)
    return total.clamp(min=0)


def relative(error: float, signal: float) -> float | None:
    """error / signal; 0 where both vanish, None where only the signal does."""
    if signal > 0:
        return error / signal
    return 0.0 if error == 0 else None


def token_error(y_tn: Tensor, yq_tn: Tensor) -> tuple[float, float]:
    """(sum_t |y - yq|^2, sum_t |y|^2) of outputs float [T, N]."""
    return tuple(float(part.square().sum(-1).double().sum()) for part in (y_tn - yq_tn, y_tn))  # type: ignore[return-value]
