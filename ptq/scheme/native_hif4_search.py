"""The search of a weight's HiF4 scales, compiled by numba: the choice of `ptq.scheme.hif4_search.searched`, bit for bit.

Nothing here is contracted to fused multiply-adds, flushed or reassociated. The file has no helpers elsewhere: numba's cache notices
changes of a kernel's own file only.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ptq.scheme.native import kernel

FOURS, EIGHTS = 16, 8
BINADE = 4
"""Bytes from one S to twice that S."""
NAN_SCALE = 255
ROUND_TO_INTEGER = np.float32(2.0**23)
"""Added and subtracted again."""
f32, i32, u32 = np.float32, np.int32, np.uint32


@kernel
def search(w, start, first, steps, weights, lowest, spacing, offsets, words):
    """The scale word of each group with the smallest weighted squared error: `ptq.scheme.hif4_search.searched`, bit for bit.

    Args:
        w: float32 [n, 64]; start: number of the first of these groups.
        first: int32 [n], the byte of each group's own conversion.
        steps: float32 [n, rungs], S / 4 of the bytes from `lowest` on.
        weights: float32 [G, 64], those of group g at row g % G.
        lowest, spacing: bytes from `first` to the lowest rung, and between rungs.
        offsets: int32, bytes tried, best first. words: int32 [n], written.
    """
    double = BINADE // spacing
    y, weight = np.empty((4, FOURS), np.float32), np.empty((4, FOURS), np.float32)
    errors = np.empty((steps.shape[1], FOURS), np.float32)
    for g in range(len(w)):
        column = (start + g) % len(weights)
        for i in range(FOURS):
            for j in range(4):
                y[j, i] = abs(w[g, 4 * i + j])
                weight[j, i] = weights[column, 4 * i + j]
        for rung in range(steps.shape[1]):
            _weighted_errors(y, weight, steps[g, rung], errors[rung])
        best, chosen = f32(np.inf), 0
        for offset in offsets:
            if first[g] + offset < 0 or first[g] + offset >= NAN_SCALE:
                continue
            error = f32(0.0)
            for i in range(EIGHTS):
                low, high = _low_and_high(errors, (offset - lowest) // spacing, double, i)
                error += min(low, high)
            if error < best:
                best, chosen = error, offset
        words[g] = i32(_searched_exponents(i32(first[g] + chosen), errors, (chosen - lowest) // spacing, double))


@njit(error_model="numpy")
def _weighted_errors(y, weight, step, out):
    """Weighted squared error of each four elements under a step, added one after the other."""
    for i in range(FOURS):
        total = f32(0.0)
        for j in range(4):
            level = f32(f32(min(y[j, i] / step, f32(8.0)) + ROUND_TO_INTEGER) - ROUND_TO_INTEGER)
            difference = y[j, i] - f32(min(level, f32(7.0)) * step)
            total += f32(f32(difference * difference) * weight[j, i])
        out[i] = total


@njit(error_model="numpy")
def _low_and_high(errors, at, double, i):
    """Errors of the eight elements i with e8 = 0 and with e8 = 1 under the rung `at`; e16 at its best."""
    a, b, once, twice = 2 * i, 2 * i + 1, at + double, at + 2 * double
    low = min(errors[at, a], errors[once, a]) + min(errors[at, b], errors[once, b])
    return low, min(errors[once, a], errors[twice, a]) + min(errors[once, b], errors[twice, b])


@njit(error_model="numpy")
def _searched_exponents(byte, errors, at, double):
    """Scale word of a byte with the best exponents for its errors, those of its own step in row `at`."""
    word = u32(byte)
    for i in range(EIGHTS):
        low, high = _low_and_high(errors, at, double, i)
        e8 = 1 if high < low else 0
        word |= u32(e8) << u32(8 + i)
        for j in range(2 * i, 2 * i + 2):
            e16 = 1 if errors[at + (e8 + 1) * double, j] < errors[at + e8 * double, j] else 0
            word |= u32(e16) << u32(16 + j)
    return word
