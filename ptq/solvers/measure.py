"""How good a quantized weight is: weight SQNR, output error in trace form, output error on tokens.

Sums stay on their device as float64 tensors; who reports them reads all of an input's figures at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 1024
"""Columns taken at a time."""


def sqnr_db(error: float, signal: float) -> float | None:
    """10 log10(signal / error) of sums of squares; None where either is zero and there is no such figure."""
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


def energy(x: Tensor) -> Tensor:
    """Sum of the squares of float32 [R, C], float64 []."""
    return x.square().sum(-1).double().sum()
