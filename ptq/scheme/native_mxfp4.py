"""MXFP4 on rows of 32, compiled by numba: the arithmetic of `ptq.scheme.mxfp4`, bit for bit.

Magnitudes are handled as float32 bits in int32, so that the loops over a group become vector instructions. numba widens
int32 arithmetic to 64 bits, hence the casts. Nothing here is contracted to fused multiply-adds, flushed or reassociated.

All compiled code of the format is in this file: numba's cache notices changes of a kernel's own file only.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ptq.scheme.native import kernel

GROUP = 32
f32, i32, u32 = np.float32, np.int32, np.uint32
SIGN, INFINITY, NAN = u32(0x80000000), i32(0x7F800000), u32(0x7FC00000)
QUARTER, THREE_QUARTERS, ONE = i32(0x3E800000), i32(0x3F400000), i32(0x3F800000)
NAN_SCALE, MAX_SCALE = i32(255), i32(252)


@kernel
def codes(x, shift, carry, mse, even, out, scales):
    """Elements or packed elements and scale bytes; see `ptq.scheme.native.Kernels`."""
    magnitude = np.empty(GROUP, np.int32)
    sign = np.empty(GROUP, np.int32)
    error = np.empty(GROUP, np.float32)
    elements = np.empty(GROUP, np.uint8)
    pairs = elements.view(np.uint16)
    packed = out.shape[1] == GROUP // 2
    for g in range(len(x)):
        for k in range(GROUP):
            bits = u32(u32(x[g, k]) << u32(shift))
            magnitude[k] = i32(bits & ~SIGN)
            sign[k] = i32((bits >> u32(31)) << u32(3))
        scale = _scale(magnitude, carry, mse, even, error)
        scales[g] = scale
        if scale == NAN_SCALE:
            out[g] = 0
            continue
        reciprocal = _reciprocal(scale)
        for k in range(GROUP):
            index = _index(i32(magnitude[k]).view(f32) * reciprocal, even)
            elements[k] = index | (sign[k] if index > 0 else i32(0))
        if packed:
            for k in range(GROUP // 2):
                out[g, k] = pairs[k] | (pairs[k] >> 4)
        else:
            for k in range(GROUP):
                out[g, k] = elements[k]


@kernel
def values(x, shift, carry, mse, even, out):
    """Values on the grid; see `ptq.scheme.native.Kernels`."""
    magnitude = np.empty(GROUP, np.int32)
    sign = np.empty(GROUP, np.uint32)
    error = np.empty(GROUP, np.float32)
    for g in range(len(x)):
        for k in range(GROUP):
            bits = u32(u32(x[g, k]) << u32(shift))
            magnitude[k] = i32(bits & ~SIGN)
            sign[k] = bits & SIGN
        scale = _scale(magnitude, carry, mse, even, error)
        if scale == NAN_SCALE:
            out[g] = NAN >> u32(shift)
            continue
        reciprocal = _reciprocal(scale)
        step = i32(i32(0x00400000) if scale == 0 else i32(scale << i32(23))).view(f32)
        for k in range(GROUP):
            value = f32(_rounded(i32(magnitude[k]).view(f32) * reciprocal, even) * step).view(u32)
            out[g, k] = u32(value | (sign[k] if value != 0 else u32(0))) >> u32(shift)


@kernel
def decode(elements, scales, out):
    """Exact values of codes; see `ptq.scheme.native.Kernels`."""
    packed = elements.shape[1] == GROUP // 2
    signed = np.zeros(16, np.float32)  # the nibble 8 is never written, and decodes to +0
    for k in range(1, 8):
        signed[k] = f32(0.5 * k) if k < 4 else f32((2 + k % 2) << (k // 2 - 2))
        signed[8 + k] = -signed[k]
    for g in range(len(scales)):
        if scales[g] == NAN_SCALE:
            out[g] = f32(np.nan)
            continue
        step = i32(i32(0x00400000) if scales[g] == 0 else i32(i32(scales[g]) << i32(23))).view(f32)
        if packed:
            for k in range(GROUP // 2):
                out[g, 2 * k] = signed[elements[g, k] & 15] * step
                out[g, 2 * k + 1] = signed[elements[g, k] >> 4] * step
        else:
            for k in range(GROUP):
                out[g, k] = signed[elements[g, k] & 15] * step


@njit(error_model="numpy")
def _scale(magnitude, carry, mse, even, error):
    """Magnitude bits [32] -> scale byte as int32. `error` is scratch, float32 [32]."""
    largest = i32(0)
    for k in range(GROUP):
        largest = max(largest, magnitude[k])
    if largest >= INFINITY:
        return NAN_SCALE
    scale = i32(min(max(i32(i32(largest + i32(carry)) >> i32(23)) - i32(2), i32(0)), MAX_SCALE))
    if mse and scale < MAX_SCALE:
        reciprocal = _reciprocal(scale)
        kept = _squared_error(magnitude, reciprocal, f32(1.0), even, error)
        raised = _squared_error(magnitude, reciprocal, f32(2.0), even, error)
        if raised < kept:
            scale = i32(scale + i32(1))
    return scale


@njit(error_model="numpy")
def _reciprocal(scale):
    return i32(max(i32(254) - scale, i32(1)) << i32(23)).view(f32)


@njit(error_model="numpy")
def _squared_error(magnitude, reciprocal, factor, even, error):
    """Squared error of rounding at `factor` (1 or 2) scales, summed in halves as in `ptq.scheme.mxfp4`."""
    for k in range(GROUP):
        y = i32(magnitude[k]).view(f32) * reciprocal
        difference = _rounded(f32(y * (f32(1.0) / factor)), even) * factor - y
        error[k] = difference * difference
    width = GROUP // 2
    while width:
        for k in range(width):
            error[k] += error[k + width]
        width >>= 1
    return error[0]


@njit(error_model="numpy")
def _index(y, even):
    bits = f32(y).view(i32)
    large = min(i32(_mantissa_rounded(bits, even) - i32(252)), i32(7))
    return large if bits >= ONE else _halves(bits, even)


@njit(error_model="numpy")
def _rounded(y, even):
    bits = f32(y).view(i32)
    large = min(i32(_mantissa_rounded(bits, even) << i32(22)).view(f32), f32(6.0))
    return large if bits >= ONE else f32(_halves(bits, even)) * f32(0.5)


@njit(error_model="numpy")
def _mantissa_rounded(bits, even):
    carry = i32(i32(0x1FFFFF) + (i32(bits >> i32(22)) & i32(1))) if even else i32(0x200000)
    return i32(i32(bits + carry) >> i32(22))


@njit(error_model="numpy")
def _halves(bits, even):
    first = i32(bits > QUARTER) if even else i32(bits >= QUARTER)
    return i32(first + i32(bits >= THREE_QUARTERS))
