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
Y, ERRORS, LEAST, BEST, POWERS, RAISED, WORK = 0, 128, 256, 320, 448, 480, 512
"""Where the search keeps what, in one array of WORK float32: between arrays LLVM would check for overlap, and give up."""
ROW = 2 * FOURS
"""Errors of fours under one step, twice in a row: a load 8 further finds the other four of an eight in every lane."""


@kernel
def codes(x, shift, rule, even, out, scales):
    """Elements or packed elements and scale words; see `ptq.scheme.native.Kernels`."""
    magnitude = np.empty(GROUP, np.int32)
    levels = np.empty(GROUP, np.int32)
    fours = np.empty(FOURS, np.int32)
    factors = np.empty(FOURS, np.float32)
    lanes, work = np.empty(GROUP, np.uint32), np.empty(WORK, np.float32)
    elements = np.empty(GROUP, np.uint8)
    pairs = elements.view(np.uint16)
    packed = out.shape[1] == GROUP // 2
    for g in range(len(x)):
        if rule == MSE:
            word = _searched_word(x, g, shift, even, magnitude, factors, lanes, work, levels)
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
    """Values on the grid; see `ptq.scheme.native.Kernels`. `out` may be x itself."""
    magnitude = np.empty(GROUP, np.int32)
    levels = np.empty(GROUP, np.int32)
    fours = np.empty(FOURS, np.int32)
    factors = np.empty(FOURS, np.float32)
    lanes, work = np.empty(GROUP, np.uint32), np.empty(WORK, np.float32)
    for g in range(len(x)):
        if rule == MSE:
            _searched_values(x, g, shift, even, lanes, work, out)
            continue
        if rule == P2:
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
def _to_lanes(x, g, shift, lanes):
    """Bits of a group in the order of the search: element j of four h of eight i goes to 16 j + 8 h + i.

    The elements of a four are then 16 apart and the two fours of an eight 8, so every loop over fours is vector instructions.
    """
    for i in range(EIGHTS):
        for h in range(2):
            for j in range(4):
                lanes[FOURS * j + EIGHTS * h + i] = u32(u32(x[g, 8 * i + 4 * h + j]) << u32(shift))


@njit(error_model="numpy")
def _search(lanes, work):
    """`_reference` with the scales of the smallest squared error: bits of a group in lanes -> its byte, 0xFF where not finite.

    Fills work[POWERS + lane] with 2^(e8 + e16) of each four and work[RAISED + lane] with its e8; the rest of it is scratch.
    """
    largest = i32(0)
    for k in range(GROUP):
        largest = max(largest, i32(lanes[k] & ~SIGN))
    if largest >= INFINITY:
        return i32(NAN_SCALE)
    first = _scale_byte(largest)
    exponent = i32(i32(first >> i32(2)) - i32(48))
    unit = i32(i32(i32(129) - exponent) << i32(23)).view(f32)  # 4 / 2^exponent
    for k in range(GROUP):
        work[Y + k] = min(i32(lanes[k] & ~SIGN).view(f32) * unit, MSE_LARGEST)
    best, chosen = f32(np.inf), 0
    for offset in range(MSE_BYTES):
        if first + offset >= NAN_SCALE:
            break
        step = f32(_scale(i32(first + offset)) * f32(unit * f32(0.25)))
        _errors(f32(1.0) / step, step, work)
        for p in range(FOURS):
            low, high = _errors_of_eight(work, ERRORS, p)
            work[LEAST + p] = min(low, high)
        # Neighbours are added first, as in `ptq.scheme.hif4`.
        half = (work[LEAST] + work[LEAST + 1]) + (work[LEAST + 2] + work[LEAST + 3])
        error = half + ((work[LEAST + 4] + work[LEAST + 5]) + (work[LEAST + 6] + work[LEAST + 7]))
        if error < best:
            best, chosen = error, offset
            for p in range(3 * ROW):
                work[BEST + p] = work[ERRORS + p]
    for p in range(FOURS):
        low, high = _errors_of_eight(work, BEST, p)
        lower = f32(2.0) if work[BEST + ROW + p] < work[BEST + p] else f32(1.0)
        upper = f32(4.0) if work[BEST + 2 * ROW + p] < work[BEST + ROW + p] else f32(2.0)
        work[RAISED + p] = f32(1.0) if high < low else f32(0.0)
        work[POWERS + p] = upper if high < low else lower
    return i32(first + chosen)


@njit(error_model="numpy")
def _errors(r, step, work):
    """Squared errors of fours under a step with the rounded reciprocal r and under its doubles, twice each, from work[ERRORS]."""
    r2, step2 = r * f32(0.5), step * f32(2.0)
    r4, step4 = r * f32(0.25), step * f32(4.0)
    for p in range(FOURS):
        a, b, c, d = work[Y + p], work[Y + p + FOURS], work[Y + p + 2 * FOURS], work[Y + p + 3 * FOURS]
        none = (_square(a, r, step) + _square(b, r, step)) + (_square(c, r, step) + _square(d, r, step))
        once = (_square(a, r2, step2) + _square(b, r2, step2)) + (_square(c, r2, step2) + _square(d, r2, step2))
        twice = (_square(a, r4, step4) + _square(b, r4, step4)) + (_square(c, r4, step4) + _square(d, r4, step4))
        work[ERRORS + p] = none
        work[ERRORS + p + FOURS] = none
        work[ERRORS + ROW + p] = once
        work[ERRORS + ROW + p + FOURS] = once
        work[ERRORS + 2 * ROW + p] = twice
        work[ERRORS + 2 * ROW + p + FOURS] = twice


@njit(error_model="numpy")
def _square(y, r, step):
    level = min(f32(f32(y * r + ROUND_TO_INTEGER) - ROUND_TO_INTEGER), f32(7.0))
    difference = f32(level * step) - y
    return f32(difference * difference)


@njit(error_model="numpy")
def _errors_of_eight(work, start, p):
    """Squared errors of the eight that the four p is of, with e8 = 0 and with e8 = 1."""
    a, b = start + p, start + p + EIGHTS
    low = min(work[a], work[a + ROW]) + min(work[b], work[b + ROW])
    high = min(work[a + ROW], work[a + 2 * ROW]) + min(work[b + ROW], work[b + 2 * ROW])
    return low, high


@njit(error_model="numpy")
def _searched_word(x, g, shift, even, magnitude, factors, lanes, work, levels):
    """`_reference` under the rule `mse`."""
    _to_lanes(x, g, shift, lanes)
    byte = _search(lanes, work)
    if byte == i32(NAN_SCALE):
        return NAN_SCALE
    word, r = u32(byte), f32(4.0) / _scale(byte)
    for i in range(EIGHTS):
        e8 = work[RAISED + i]
        word |= u32(e8) << u32(8 + i)
        for h in range(2):
            power = work[POWERS + EIGHTS * h + i]
            e16 = 1 if power > e8 + f32(1.0) else 0
            word |= u32(e16) << u32(16 + 2 * i + h)
            factors[2 * i + h] = r / power
    for k in range(GROUP):
        magnitude[k] = i32(u32(u32(x[g, k]) << u32(shift)) & ~SIGN)
    _round(magnitude, factors, even, levels)
    return word


@njit(error_model="numpy")
def _searched_values(x, g, shift, even, lanes, work, out):
    """Values of a group on the grid under the rule `mse`."""
    _to_lanes(x, g, shift, lanes)
    byte = _search(lanes, work)
    if byte == i32(NAN_SCALE):
        for k in range(GROUP):
            out[g, k] = NAN >> u32(shift)
        return
    quarter, r = f32(_scale(byte) * f32(0.25)), f32(4.0) / _scale(byte)
    for p in range(FOURS):
        power = work[POWERS + p]
        step, factor = quarter * power, r * (f32(1.0) / power)
        lanes[p] = _value(lanes[p], factor, step, even)
        lanes[p + FOURS] = _value(lanes[p + FOURS], factor, step, even)
        lanes[p + 2 * FOURS] = _value(lanes[p + 2 * FOURS], factor, step, even)
        lanes[p + 3 * FOURS] = _value(lanes[p + 3 * FOURS], factor, step, even)
    for i in range(EIGHTS):
        for h in range(2):
            for j in range(4):
                out[g, 8 * i + 4 * h + j] = lanes[FOURS * j + EIGHTS * h + i] >> u32(shift)


@njit(error_model="numpy")
def _value(bits, factor, step, even):
    """Bits of an element -> those of its value on the grid."""
    scaled = i32(bits & ~SIGN).view(f32) * factor
    if even:
        level = f32(f32(min(scaled, f32(7.0)) + ROUND_TO_INTEGER) - ROUND_TO_INTEGER)
    else:
        level = f32(i32(min(scaled + f32(0.5), f32(7.0))))
    value = f32(level * step).view(u32)
    return u32(value | ((bits & SIGN) if value != u32(0) else u32(0)))


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
