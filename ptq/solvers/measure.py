"""How good a quantized weight is: weight SQNR, output error in trace form, output error on tokens.

Sums stay on their device as float64 tensors; who reports them reads all of an input's figures at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048
"""Columns taken at a time."""
ROWS = 512
"""Rows taken at a time on a CPU: products of a few megabytes, because larger ones cost more in fresh memory pages than in
arithmetic."""

SAMPLE_ROWS = 1024
"""Output rows of each Linear on which output errors are estimated."""
SAMPLE_TOKENS = 1024
"""Sample tokens on which they are."""


@dataclass(frozen=True)
class SampleRows:
    """Some rows of Linears that stand above each other: their positions, and how many are of each Linear."""

    index: Tensor
    sizes: list[int]


def sample_tokens(x_tk: Tensor) -> Tensor:
    """Evenly spaced ones of the sample tokens, `SAMPLE_TOKENS` or up to twice as many; all where there are no more."""
    return x_tk[:: max(1, len(x_tk) // SAMPLE_TOKENS)]


def row_step(n: int) -> int:
    """Distance of the rows of n that are looked at: `SAMPLE_ROWS` of them or up to twice as many, all where there are no more."""
    return max(1, n // SAMPLE_ROWS)


def sample_rows(sizes: Sequence[int], device: torch.device) -> SampleRows:
    """Every `row_step` row of Linears with so many rows each."""
    ranges, first = [], 0
    for n in sizes:
        ranges.append(torch.arange(first, first + n, row_step(n), device=device))
        first += n
    return SampleRows(torch.cat(ranges), list(map(len, ranges)))


def sqnr_db(error: float, signal: float) -> float | None:
    """10 log10(signal / error) of sums of squares; None where either is zero and there is no such figure."""
    return 10.0 * math.log10(signal / error) if signal > 0 and error > 0 else None


def trace_errors(e_nk: Tensor, h_kk: Tensor) -> Tensor:
    """diag(E H E^T) as float64 [N]: the squared output error of each row over the tokens in H, never negative.

    H must be symmetric: only its upper block triangle is read, which halves the work.
    """
    rows = len(e_nk) if e_nk.is_cuda else ROWS
    return torch.cat([_trace_of_rows(part, h_kk) for part in e_nk.to(h_kk.dtype).split(max(rows, 1))])


def _trace_of_rows(e_rk: Tensor, h_kk: Tensor) -> Tensor:
    total = torch.zeros(len(e_rk), dtype=torch.float64, device=e_rk.device)
    start = 0
    for own, columns in zip(e_rk.split(BLOCK, 1), h_kk.split(BLOCK, 1), strict=True):
        stop = start + own.shape[1]
        product = torch.addmm(own @ columns[start:stop], e_rk[:, :start], columns[:start], alpha=2.0)
        total += product.mul_(own).sum(-1)
        start = stop
    return total.clamp_(min=0)


def relative(error: float, signal: float) -> float | None:
    """error / signal; 0 where both vanish, None where only the signal does."""
    if signal > 0:
        return error / signal
    return 0.0 if error == 0 else None


def row_energies(output: Tensor) -> Tensor:
    """Squares of float32 [T, N], outputs of N rows for T tokens, summed over the tokens: [N]."""
    return output.square().sum(0)
