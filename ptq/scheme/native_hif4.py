"""HiF4 on rows of 64, compiled by numba: the arithmetic of `ptq.scheme.hif4`, bit for bit.

Magnitudes are handled as float32 bits in int32; maxima of bits are maxima of values. numba widens int32 arithmetic to 64
bits, hence the casts. Nothing here is contracted to fused multiply-adds, flushed or reassociated.

All compiled code of the format is in this file: numba's cache notices changes of a kernel's own file only.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ptq.scheme.native import kernel

GROUP, FOURS, EIGHTS = 64, 16, 8
f32, i32, u32 = np.float32, np.int32, np.uint32
SIGN, INFINITY, NAN = u32(0x80000000), i32(0x7F800000), u32(0x7FC00000)
NAN_SCALE = u32(255)
SCALE_MIN, SCALE_MAX, BF16_ONE_SEVENTH = f32(2.0**-48), f32(49152.0), f32(0.142578125)
ROUND_TO_INTEGER = f32(2.0**23)
"""Added and subtracted again."""
EXPONENT_BIAS = i32(127 - 48)
MSE_BYTES, MSE_LARGEST = 3, f32(128.0)
MSE, P2 = 1, 2
"""Positions in `HiF4.scale_rules`."""
P2_MIN_EXPONENT, P2_MAX_EXPONENT = i32(-48), i32(15)


@kernel
def codes(x, shift, rule, even, out, scales):
    """Elements or packed elements and scale words; see `ptq.scheme.native.Kernels`."""
    magnitude = np.empty(GROUP, np.int32)
    levels = np.empty(GROUP, np.int32)
    fours = np.empty(FOURS, np.int32)
    factors = np.empty(FOURS, np.float32)
    errors = np.empty((MSE_BYTES, 3, FOURS), np.float32)
    y = np.empty((4, FOURS), np.float32)
    elements = np.empty(GROUP, np.uint8)
    pairs = elements.view(np.uint16)
    packed = out.shape[1] == GROUP // 2
    for g in range(len(x)):
        if rule == MSE:
            word = _search(x[g], shift, even, magnitude, factors, y, errors, levels)
        elif rule == P2:
            word = _power_of_two_scale(x[g], shift, even, magnitude, fours, factors, levels)
        else:
            word = _reference(x[g], shift, even, magnitude, fours, factors, levels)
        scales[g] = i32(word)
        if word == NAN_SCALE:
            out[g] = 0
            continue
        for k in range(GROUP):
            sign = i32((u32(u32(x[g, k]) << u32(shift)) >> u32(31)) << u32(3))
            elements[k] = levels[k] | (sign if levels[k] > 0 else i32(0))
        if packed:
            for k in range(GROUP // 2):
                out[g, k] = pairs[k] | (pairs[k] >> 4)
        else:
            for k in range(GROUP):
                out[g, k] = elements[k]


@kernel
def values(x, shift, rule, even, out):
    """Values on the grid; see `ptq.scheme.native.Kernels`."""
    magnitude = np.empty(GROUP, np.int32)
    levels = np.empty(GROUP, np.int32)
    fours = np.empty(FOURS, np.int32)
    factors = np.empty(FOURS, np.float32)
    errors = np.empty((MSE_BYTES, 3, FOURS), np.float32)
    y = np.empty((4, FOURS), np.float32)
    for g in range(len(x)):
        if rule == MSE:
            word = _search(x[g], shift, even, magnitude, factors, y, errors, levels)
        elif rule == P2:
            word = _power_of_two_scale(x[g], shift, even, magnitude, fours, factors, levels)
        else:
            word = _reference(x[g], shift, even, magnitude, fours, factors, levels)
        if word == NAN_SCALE:
            out[g] = NAN >> u32(shift)
            continue
        quarter = f32(_scale(i32(word & u32(0xFF))) * f32(0.25))
        for i in range(FOURS):
            exponent = (word >> u32(8 + i // 2) & u32(1)) + (word >> u32(16 + i) & u32(1))
            step = quarter * f32(1 << exponent)
            for k in range(4 * i, 4 * i + 4):
                sign = u32(u32(x[g, k]) << u32(shift)) & SIGN
                value = f32(f32(levels[k]) * step).view(u32)
                out[g, k] = u32(value | (sign if value != 0 else u32(0))) >> u32(shift)


@kernel
def decode(elements, scales, out):
    """Exact values of codes; see `ptq.scheme.native.Kernels`."""
    packed = elements.shape[1] == GROUP // 2
    nibbles = np.empty(GROUP, np.int32)
    steps = np.empty(GROUP, np.float32)
    for g in range(len(scales)):
        word = u32(scales[g])
        byte = word & u32(0xFF)
        if byte == NAN_SCALE:
            out[g] = f32(np.nan)
            continue
        if packed:
            for k in range(GROUP // 2):
                nibbles[2 * k], nibbles[2 * k + 1] = elements[g, k] & 15, elements[g, k] >> 4
        else:
            for k in range(GROUP):
                nibbles[k] = elements[g, k]
        quarter = f32(_scale(i32(byte)) * f32(0.25))
        for i in range(FOURS):
            exponent = (word >> u32(8 + i // 2) & u32(1)) + (word >> u32(16 + i) & u32(1))
            step = quarter * f32(1 << exponent)
            for k in range(4 * i, 4 * i + 4):
                steps[k] = step
        for k in range(GROUP):  # signed as an integer: there is no -0
            out[g, k] = f32(i32((nibbles[k] & i32(7)) * (i32(1) - i32(2) * (nibbles[k] >> i32(3))))) * steps[k]


@njit(error_model="numpy")
def _maxima(x, shift, magnitude, fours):
    """Bits of |x| [64] into `magnitude`, the largest of each four into `fours`; returns the largest."""
    for k in range(GROUP):
        magnitude[k] = i32(u32(u32(x[k]) << u32(shift)) & ~SIGN)
    for i in range(FOURS):
        fours[i] = max(max(magnitude[4 * i], magnitude[4 * i + 1]), max(magnitude[4 * i + 2], magnitude[4 * i + 3]))
    largest = i32(0)
    for i in range(FOURS):
        largest = max(largest, fours[i])
    return largest


@njit(error_model="numpy")
def _reference(x, shift, even, magnitude, fours, factors, levels):
    """One group [64] -> its scale word, 0xFF where it is not finite; fills `levels` with 0..7. The rest is scratch."""
    largest = _maxima(x, shift, magnitude, fours)
    if largest >= INFINITY:
        return NAN_SCALE
    byte = _scale_byte(largest)
    r = _to_bf16(f32(1.0) / _scale(byte))
    word = u32(byte)
    for i in range(FOURS // 2):
        e8 = i32(max(fours[2 * i], fours[2 * i + 1])).view(f32) * r >= f32(4.0)
        half_e8 = f32(0.5) if e8 else f32(1.0)
        word |= u32(e8) << u32(8 + i)
        for j in range(2 * i, 2 * i + 2):
            e16 = i32(fours[j]).view(f32) * r * half_e8 >= f32(2.0)
            word |= u32(e16) << u32(16 + j)
            factors[j] = r * f32(4.0) * half_e8 * (f32(0.5) if e16 else f32(1.0))
    _round(magnitude, factors, even, levels)
    return word


@njit(error_model="numpy")
def _power_of_two_scale(x, shift, even, magnitude, fours, factors, levels):
    """`_reference` under the rule `p2`. Bits of a power of two times 2^n are those plus n << 23."""
    largest = _maxima(x, shift, magnitude, fours)
    if largest >= INFINITY:
        return NAN_SCALE
    exponent = i32(min(max(i32(i32(largest >> i32(23)) - i32(129)), P2_MIN_EXPONENT), P2_MAX_EXPONENT))
    two = i32(i32(exponent + i32(128)) << i32(23))  # bits of 2 S
    four = i32(i32(exponent + i32(129)) << i32(23))
    word = u32(i32(i32(exponent + i32(48)) << i32(2)))
    for i in range(FOURS // 2):
        e8 = 1 if max(fours[2 * i], fours[2 * i + 1]) >= four else 0
        word |= u32(e8) << u32(8 + i)
        for j in range(2 * i, 2 * i + 2):
            e16 = 1 if fours[j] >= (four if e8 else two) else 0
            word |= u32(e16) << u32(16 + j)
            factors[j] = i32(i32(i32(129) - exponent - i32(e8 + e16)) << i32(23)).view(f32)
    _round(magnitude, factors, even, levels)
    return word


@njit(error_model="numpy")
def _search(x, shift, even, magnitude, factors, y, errors, levels):
    """`_reference` with the scales of the smallest squared error. Scratch: errors [3, 3, 16] by byte and e8 + e16, and y.

    y [4, 16] holds the elements of a four in its rows, so that the loops over fours become vector instructions.
    """
    largest = i32(0)
    for k in range(GROUP):
        magnitude[k] = i32(u32(u32(x[k]) << u32(shift)) & ~SIGN)
        largest = max(largest, magnitude[k])
    if largest >= INFINITY:
        return NAN_SCALE
    first = _scale_byte(largest)
    exponent = i32(i32(first >> i32(2)) - i32(48))
    unit = i32(i32(i32(129) - exponent) << i32(23)).view(f32)  # 4 / 2^exponent
    for i in range(FOURS):
        for j in range(4):
            y[j, i] = min(i32(magnitude[4 * i + j]).view(f32) * unit, MSE_LARGEST)
    best, chosen = f32(np.inf), 0
    for offset in range(MSE_BYTES):
        if first + offset >= NAN_SCALE:
            break
        step = f32(_scale(i32(first + offset)) * f32(unit * f32(0.25)))
        r = f32(1.0) / step
        for j in range(3):
            power = f32(1 << j)
            _squared_errors(y, r / power, step * power, errors[offset, j])
        # Neighbours are added first, as in `ptq.scheme.hif4`.
        half = _least_of_two_eights(errors[offset], 0) + _least_of_two_eights(errors[offset], 2)
        error = half + (_least_of_two_eights(errors[offset], 4) + _least_of_two_eights(errors[offset], 6))
        if error < best:
            best, chosen = error, offset
    word = _exponents(i32(first + chosen), errors[chosen], factors)
    _round(magnitude, factors, even, levels)
    return word


@njit(error_model="numpy")
def _round(magnitude, factors, even, levels):
    """Levels 0..7 of a group under the reciprocal steps of its fours."""
    for i in range(FOURS):
        for k in range(4 * i, 4 * i + 4):
            scaled = i32(magnitude[k]).view(f32) * factors[i]
            if even:
                levels[k] = i32(f32(min(scaled, f32(7.0)) + ROUND_TO_INTEGER) - ROUND_TO_INTEGER)
            else:
                levels[k] = i32(min(scaled + f32(0.5), f32(7.0)))


@njit(error_model="numpy")
def _squared_errors(y, r, step, out):
    """Squared error of each four elements under a step with the rounded reciprocal r."""
    for i in range(FOURS):
        first = _square(y[0, i], r, step) + _square(y[1, i], r, step)
        second = _square(y[2, i], r, step) + _square(y[3, i], r, step)
        out[i] = first + second


@njit(error_model="numpy")
def _square(y, r, step):
    level = min(f32(f32(y * r + ROUND_TO_INTEGER) - ROUND_TO_INTEGER), f32(7.0))
    difference = f32(level * step) - y
    return f32(difference * difference)


@njit(error_model="numpy")
def _error_of_eight(errors, i):
    """Squared errors [3, 16] of fours, by e8 + e16 -> those of the eight elements i with e8 = 0 and with e8 = 1."""
    a, b = 2 * i, 2 * i + 1
    low = min(errors[0, a], errors[1, a]) + min(errors[0, b], errors[1, b])
    high = min(errors[1, a], errors[2, a]) + min(errors[1, b], errors[2, b])
    return low, high


@njit(error_model="numpy")
def _least_of_two_eights(errors, i):
    low, high = _error_of_eight(errors, i)
    next_low, next_high = _error_of_eight(errors, i + 1)
    return min(low, high) + min(next_low, next_high)


@njit(error_model="numpy")
def _exponents(byte, errors, factors):
    """Scale word of a byte with the best exponents for its errors [3, 16]; fills `factors`."""
    word = u32(byte)
    r = f32(4.0) / _scale(byte)
    for i in range(EIGHTS):
        low, high = _error_of_eight(errors, i)
        e8 = 1 if high < low else 0
        word |= u32(e8) << u32(8 + i)
        for j in range(2 * i, 2 * i + 2):
            e16 = 1 if errors[e8 + 1, j] < errors[e8, j] else 0
            word |= u32(e16) << u32(16 + j)
            factors[j] = r / f32(1 << (e8 + e16))
    return word


@njit(error_model="numpy")
def _scale_byte(largest):
    """Bits of the group's maximum -> E6M2 byte of bf16(maximum / 7)."""
    s = min(max(_to_bf16(i32(largest).view(f32) * BF16_ONE_SEVENTH), SCALE_MIN), SCALE_MAX)
    bits = f32(s).view(i32)
    rounded = i32(bits + i32(i32(0xFFFFF) + (i32(bits >> i32(21)) & i32(1))))
    return i32(i32(rounded >> i32(21)) - i32(EXPONENT_BIAS << i32(2)))


@njit(error_model="numpy")
def _scale(byte):
    exponent = i32(i32(byte >> i32(2)) + EXPONENT_BIAS)
    return i32(i32(exponent << i32(23)) | i32(i32(byte & i32(3)) << i32(21))).view(f32)


@njit(error_model="numpy")
def _to_bf16(x):
    bits = f32(x).view(i32)
    return i32(i32(bits + i32(i32(0x7FFF) + (i32(bits >> i32(16)) & i32(1)))) & i32(-0x10000)).view(f32)
