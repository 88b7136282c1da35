"""A format's elements as numbers that a compiled loop can use: thresholds of |x / step| and the level behind each.

Once scales are fixed a format is a nearest-level quantizer on x / step (`Format.encode`), the sign apart. Its thresholds
are found by asking `encode` itself, so a format brings nothing for it and none is written down twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq.scheme import Format

LEVELS = 8
"""Magnitudes of a nibble."""
PROBES = 4096
"""Values on which thresholds are compared with `encode`."""


@dataclass(frozen=True)
class Grid:
    """Element = how many thresholds |x / step| reaches, | 8 where x < 0 and it reaches one; value = +-level * step.

    Attributes:
        thresholds: float32 [7], ascending: the smallest |x / step| of elements 1 to 7.
        levels: float32 [8], of elements 0 to 7; element | 8 has the negative of it.
    """

    thresholds: Tensor
    levels: Tensor

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Both as numpy arrays."""
        return self.thresholds.numpy(), self.levels.numpy()

    def to(self, device: torch.device) -> Grid:
        return Grid(self.thresholds.to(device), self.levels.to(device))


@functools.lru_cache(maxsize=16)
def grid_of(fmt: Format) -> Grid | None:
    """The grid of a format; None where `encode` and `decode` are not such a quantizer and must be called themselves."""
    grid = Grid(_thresholds(fmt), fmt.levels(torch.arange(LEVELS, dtype=torch.uint8)))
    return grid if _describes(grid, fmt) else None


def _thresholds(fmt: Format) -> Tensor:
    """Bisection over the bits of positive float32, which ascend as their values do; above them all: NaN, never reached."""
    wanted = torch.arange(1, LEVELS)
    low, high = torch.zeros(LEVELS - 1, dtype=torch.int32), torch.full((LEVELS - 1,), 0x7F800000, dtype=torch.int32)
    while bool((high - low > 1).any()):
        middle = low + (high - low) // 2
        reached = _elements(fmt, middle.view(torch.float32)) >= wanted
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return torch.where(_elements(fmt, high.view(torch.float32)) >= wanted, high, 0x7FC00000).view(torch.float32)


def _elements(fmt: Format, x: Tensor) -> Tensor:
    return fmt.encode(x, torch.ones_like(x))


def _describes(grid: Grid, fmt: Format) -> bool:
    """Whether the grid gives what the format gives, for values and steps of many sizes and both signs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, generator=generator) * torch.exp(3 * torch.randn(PROBES, generator=generator))
    steps = torch.exp(2 * torch.randn(PROBES, generator=generator))
    index = torch.bucketize((x / steps).abs(), grid.thresholds.nan_to_num(torch.inf), right=True)
    elements = fmt.encode(x, steps)
    same = torch.equal(elements, (index + 8 * ((x < 0) & (index > 0))).to(torch.uint8))
    values = grid.levels[index] * torch.where(x < 0, -1.0, 1.0) * steps
    return same and torch.equal(fmt.decode(elements, steps), values)
