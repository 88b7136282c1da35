"""Device functions that round register tiles to HiF4: the two scale rules of `ptq.scheme.hif4`, operation by operation.

The rule `mse` rounds each element nine times: with three bytes, and e8 + e16 of 0, 1, 2. The four elements of a quad become
four tensors first, so that everything up to a quad's error is arithmetic within a thread. Sums are added in the order of
the eager function, two addends at a time: scales are equal and not merely close.
"""

import triton
import triton.language as tl

from ptq.runtime.kernels import blocks as b
from ptq.scheme import hif4

BF16_ONE_SEVENTH = tl.constexpr(hif4.BF16_ONE_SEVENTH)
MSE_BYTES = tl.constexpr(hif4.MSE_BYTES)
NEAREST_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2^23: its ulp is 1."""


@triton.jit
def convert(x, RULE: tl.constexpr):
    """float32 [R, L] -> (level float32 [G, 16, 4] in 0..7, quarter step float32 [G, 16], scale word int32 [G]).

    Groups that are not finite get the word 0xFF, a NaN step and no defined level. RULE: `HiF4.kernel_rule`.
    """
    G: tl.constexpr = x.shape[0] * x.shape[1] // 64
    quads = tl.reshape(x, (G, 16, 4))
    if RULE == 1:
        byte, r, e8, e16, finite = _search(tl.abs(x), G)
    else:
        byte, r, e8, e16, finite = _reference(quads, G)
    e8_of_16 = _of_16(e8, G)
    factor = r[:, None] * 4.0 * b.power_of_two(-e8_of_16) * b.power_of_two(-e16)
    scaled = tl.abs(quads) * factor[:, :, None]
    level = tl.minimum(tl.floor(scaled + 0.5), 7.0)
    e8_bits = tl.xor_sum(e8 << (8 + tl.arange(0, 8))[None, :], 1)
    e16_bits = tl.xor_sum(e16 << (16 + tl.arange(0, 16))[None, :], 1)
    word = tl.where(finite, byte | e8_bits | e16_bits, 255)
    quarter = e6m2_value(word & 0xFF)[:, None] * 0.25 * b.power_of_two(e8_of_16 + e16)
    return level, quarter, word


@triton.jit
def _reference(quads, G: tl.constexpr):
    """Quads [G, 16, 4] -> (byte int32 [G], 1/S rounded to bfloat16 [G], e8 int32 [G, 8], e16 int32 [G, 16], finite [G])."""
    v16 = tl.max(b.magnitude_bits(quads), 2)
    v8 = tl.max(tl.reshape(v16, (G, 8, 2)), 2)
    amax = tl.max(v8, 1)
    finite = amax < b.INF_BITS
    byte = _scale_byte(amax, finite)
    r = _reciprocal(byte, True)
    e8 = (v8.to(tl.float32, bitcast=True) * r[:, None] >= 4.0).to(tl.int32)
    v16_scaled = v16.to(tl.float32, bitcast=True) * r[:, None] * b.power_of_two(-_of_16(e8, G))
    return byte, r, e8, (v16_scaled >= 2.0).to(tl.int32), finite


@triton.jit
def _search(magnitude, G: tl.constexpr):
    """Magnitudes [R, L] -> the results of `_reference` with the smallest squared error, 1/S rounded to float32."""
    even, odd = tl.split(tl.reshape(magnitude, (G, 16, 2, 2)))
    y0, y2 = tl.split(even)
    y1, y3 = tl.split(odd)
    bits = tl.maximum(
        tl.maximum(b.magnitude_bits(y0), b.magnitude_bits(y1)), tl.maximum(b.magnitude_bits(y2), b.magnitude_bits(y3))
    )
    amax = tl.max(bits, 1)
    finite = amax < b.INF_BITS
    first = _scale_byte(amax, finite)
    exponent = (first >> 2) - 48
    unit = b.power_of_two(2 - exponent)[:, None]
    y0, y1 = tl.minimum(y0 * unit, 128.0), tl.minimum(y1 * unit, 128.0)
    y2, y3 = tl.minimum(y2 * unit, 128.0), tl.minimum(y3 * unit, 128.0)
    byte = first
    best = tl.full((G,), float("inf"), tl.float32)
    e8 = tl.zeros((G, 8), tl.int32)
    e16 = tl.zeros((G, 16), tl.int32)
    for offset in tl.static_range(MSE_BYTES):
        candidate = first + offset
        r = (_reciprocal(candidate, False) * b.power_of_two(exponent))[:, None]
        step = (e6m2_value(candidate) * b.power_of_two(-exponent))[:, None]
        error0 = _squared_error(y0, y1, y2, y3, r, step, 1.0)
        error1 = _squared_error(y0, y1, y2, y3, r, step, 2.0)
        error2 = _squared_error(y0, y1, y2, y3, r, step, 4.0)
        low = _add_neighbours(tl.minimum(error0, error1))
        high = _add_neighbours(tl.minimum(error1, error2))
        raised = (high < low).to(tl.int32)
        raised_16 = tl.where(_of_16(raised, G) == 1, error2 < error1, error1 < error0)
        error = tl.reshape(_add_neighbours(_add_neighbours(_add_neighbours(tl.minimum(low, high)))), (G,))
        better = (error < best) & (candidate < 255)
        best = tl.where(better, error, best)
        byte = tl.where(better, candidate, byte)
        e8 = tl.where(better[:, None], raised, e8)
        e16 = tl.where(better[:, None], raised_16.to(tl.int32), e16)
    return byte, _reciprocal(byte, False), e8, e16, finite


@triton.jit
def _squared_error(y0, y1, y2, y3, r, step, POWER: tl.constexpr):
    """Squared error [G, 16] of quads, given as their four elements, with 2^(e8 + e16) = POWER; r and step are [G, 1]."""
    first = _square(y0, r, step, POWER) + _square(y1, r, step, POWER)
    return first + (_square(y2, r, step, POWER) + _square(y3, r, step, POWER))


@triton.jit
def _square(y, r, step, POWER: tl.constexpr):
    magic: tl.constexpr = NEAREST_INTEGER * POWER  # its ulp is POWER
    difference = tl.minimum((y * r + magic) - magic, 7.0 * POWER) * step - y
    return difference * difference


@triton.jit
def _add_neighbours(x):
    """[G, N] -> [G, N / 2]. A sum of two has the same result in any order."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)


@triton.jit
def _of_16(e8, G: tl.constexpr):
    """[G, 8] -> [G, 16], each value twice."""
    return tl.reshape(tl.broadcast_to(e8[:, :, None], (G, 8, 2)), (G, 16))


@triton.jit
def _scale_byte(amax, finite):
    """Bits of the group maximum int32 [G] -> E6M2 byte int32 of bf16(maximum / 7)."""
    maximum = tl.where(finite, amax, 0).to(tl.float32, bitcast=True)
    s = b.to_bf16(maximum * BF16_ONE_SEVENTH).to(tl.float32)
    s = tl.minimum(tl.maximum(s, 3.552713678800501e-15), 49152.0)  # 2^-48
    bits = s.to(tl.int32, bitcast=True)
    return ((bits + 0xFFFFF + ((bits >> 21) & 1)) >> 21) - ((127 - 48) << 2)


@triton.jit
def _reciprocal(byte, BF16: tl.constexpr):
    """E6M2 bytes -> 1/S, rounded to bfloat16 or float32: the reciprocals 1, 4/5, 2/3, 4/7 of the four mantissas."""
    mantissa = byte & 3
    if BF16:
        r = tl.where(mantissa == 1, 0.80078125, tl.where(mantissa == 2, 0.66796875, 0.5703125))
    else:
        r = tl.where(mantissa == 1, 0.800000011920929, tl.where(mantissa == 2, 0.6666666865348816, 0.5714285969734192))
    return tl.where(mantissa == 0, 1.0, r) * b.power_of_two(48 - (byte >> 2))


@triton.jit
def nibbles_of(level, word, x):
    """Levels float32 [G, 16, 4], scale words [G] and the source -> nibbles int32; a zero level is never signed."""
    index = tl.where((word == 255)[:, None, None], 0.0, level).to(tl.int32)
    negative = (tl.reshape(x, level.shape) < 0) & (index > 0)
    return tl.where(negative, index | 8, index)


@triton.jit
def e6m2_value(byte):
    """E6M2 bytes int32 -> float32 S; 255 is NaN."""
    bits = (((byte >> 2) + (127 - 48)) << 23) | ((byte & 3) << 21)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def steps(word, LENGTH: tl.constexpr):
    """Scale words int32 [R, LENGTH / 64] -> quarter steps float32 [R, LENGTH / 4], one for each four elements."""
    R: tl.constexpr = word.shape[0]
    quad = tl.arange(0, 16)[None, None, :]
    bits = word[:, :, None]
    exponent = ((bits >> (8 + quad // 2)) & 1) + ((bits >> (16 + quad)) & 1)
    steps = e6m2_value(bits & 0xFF) * 0.25 * b.power_of_two(exponent)
    return tl.reshape(steps, (R, LENGTH // 4))


@triton.jit
def decode(nibbles, words):
    """Nibbles int32 [R, L] and scale words int32 [R, L/64] -> (levels float32 [R, L], quarter steps float32 [R, L/4])."""
    magnitude = (nibbles & 7).to(tl.float32)
    return tl.where(nibbles >= 8, -magnitude, magnitude) + 0.0, steps(words, nibbles.shape[1])


@triton.jit
def store(
    x, unit, offset, inside, values_ptr, scales_ptr,
    L: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Round float32 [ROWS, L] and store it; see `ptq.runtime.kernels.formats.store_tile`."""
    level, quarter, word = convert(x, RULE)
    if OUT == "packed":
        nibbles = tl.reshape(nibbles_of(level, word, x), (ROWS, L))
        b.store_packed(nibbles, tl.reshape(word, (ROWS, L // 64)), unit, inside, values_ptr, scales_ptr, L)
    else:
        magnitude = tl.reshape(level * quarter[:, :, None], (ROWS, L))
        tl.store(values_ptr + offset, b.to_bf16(b.with_sign_of(magnitude, x)), mask=inside[:, None])
