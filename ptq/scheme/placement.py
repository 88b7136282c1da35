"""Where 4-bit weights are exact in FP8: the ladder on which a weight is placed, from the exponents that its rows use.

A small number times 2^d (E2M1, for one) is exact in e4m3 for 15 values of d and in e5m2 for 29. A weight whose block
exponents span no more than that can be computed with as FP8 and one power-of-two factor, without changing a single value.
The ladder tries, in order of speed: e4m3 with one exponent for the tensor, e4m3 with one exponent a row, e5m2, and
bfloat16, which always fits.

Activations use e5m2 with a static reference exponent, so that quantizing them is one pass. Blocks outside the 29
binades are not refused, they are rounded (below: by at most 2^-17 in units of 2^e_ref) or saturated (above: at 57344 in
those units); the quantizer's counters tell how many there were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["e4m3", "e4m3-row", "e5m2", "bf16"]

E4M3_RANGE = (-8, 6)
"""Smallest and largest d for which every E2M1 * 2^d is exact in float8_e4m3fn: 0.5 * 2^-8 = 2^-9, 6 * 2^6 = 384."""
E5M2_RANGE = (-15, 13)
"""The same for float8_e5m2: 0.5 * 2^-15 = 2^-16, 6 * 2^13 = 49152."""
E_REF = 0
"""Default reference exponent of activations: exact for block exponents -15..13, that is for block maxima from 2^-13 up
to 65536. Saturation is the harmful side and would need activations that float16 cannot hold either."""
FACTOR_LIMIT = 100
"""Largest |exponent| of a placement: beyond it the product of factors could leave float32's normal range."""
DTYPES: dict[Kind, torch.dtype] = {
    "e4m3": torch.float8_e4m3fn,
    "e4m3-row": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
}
"""In the order of the ladder."""


@dataclass(frozen=True)
class Placement:
    """How a weight is held while it is multiplied: value = stored * 2^exponent, exactly.

    Attributes:
        kind: step of the ladder.
        exponent: exponent of the whole tensor (0 for "e4m3-row" and "bf16").
        row_exponents: int32 [N] for "e4m3-row", else None.
        reason: one sentence for `ptq doctor`.
    """

    kind: Kind
    exponent: int
    row_exponents: Tensor | None
    reason: str


DECODED = Placement("bf16", 0, None, "decoded to bfloat16, where every value is exact")
"""The last step, where nothing above it was looked for."""


def place_rows(low: Tensor, high: Tensor) -> Placement:
    """Place a weight on the ladder.

    Args:
        low, high: smallest and largest block exponent of each row, int32 [N]; a row of zeros has low > high.
    """
    bounds = torch.stack((low.min(), high.max(), (high - low).max())).tolist() if low.numel() else [0, 0, 0]
    lowest, highest, row_span = (int(value) for value in bounds)
    if lowest > highest:
        return Placement("e4m3", 0, None, "every code is zero")
    span = highest - lowest + 1
    e4m3, e5m2 = _binades(E4M3_RANGE), _binades(E5M2_RANGE)
    if max(abs(lowest), abs(highest)) > FACTOR_LIMIT:
        return Placement("bf16", 0, None, f"block exponents {lowest}..{highest} are too extreme for an FP8 factor")
    if span <= e4m3:
        return Placement("e4m3", highest - E4M3_RANGE[1], None, f"block exponents span {span} of e4m3's {e4m3} binades")
    if row_span + 1 <= e4m3:
        rows = torch.where(high < low, 0, high - E4M3_RANGE[1]).to(torch.int32)
        reason = f"block exponents span {span} binades, {row_span + 1} within a row (e4m3 holds {e4m3})"
        return Placement("e4m3-row", 0, rows, reason)
    if span <= e5m2:
        reason = f"block exponents span {span} binades, {row_span + 1} within a row (e4m3 holds {e4m3}, e5m2 {e5m2})"
        return Placement("e5m2", highest - E5M2_RANGE[1], None, reason)
    return Placement("bf16", 0, None, f"block exponents span {span} binades, e5m2 holds {e5m2}")


def summarize(placements: Mapping[str, Placement]) -> list[str]:
    """Layer name -> placement, as lines for `ptq doctor`: a count of each kind, then every layer below the top step."""
    counts = Counter(placement.kind for placement in placements.values())
    lines = [f"{kind}: {counts[kind]} of {len(placements)} layers" for kind in DTYPES if counts[kind]]
    lower = {name: one for name, one in placements.items() if one.kind != "e4m3"}
    return lines + [f"{name}: {one.kind}, {one.reason}" for name, one in lower.items()]


def _binades(limits: tuple[int, int]) -> int:
    return limits[1] - limits[0] + 1
