"""Device functions that round register tiles to HiF4: the scale rules of `ptq.scheme.hif4`, operation by operation.

The rule `mse` rounds each element nine times: with three bytes, and e8 + e16 of 0, 1, 2. The four elements of a quad become
four tensors first, so that everything up to a quad's error is arithmetic within a thread. Sums are added in the order of
the eager function, two addends at a time. Products that feed an addition are fused there (`tl.fma`; the interpreter rounds
between the two): on a GPU the other one of two errors that are equal up to rounding may win. What is written is never fused.
"""

import triton
import triton.language as tl

from ptq.runtime.kernels import blocks as b
from ptq.scheme import HiF4, hif4
from ptq.scheme.placement import E5M2_RANGE

BF16_ONE_SEVENTH = tl.constexpr(hif4.BF16_ONE_SEVENTH)
MSE_BYTES = tl.constexpr(hif4.MSE_BYTES)
MSE, P2 = tl.constexpr(HiF4.scale_rules.index("mse")), tl.constexpr(HiF4.scale_rules.index("p2"))
LOWEST, HIGHEST = tl.constexpr(E5M2_RANGE[0] - 1), tl.constexpr(E5M2_RANGE[1])
"""k * 2^j is exact in e5m2 for these j: its lowest bit is 2^j, that of E2M1 * 2^d is 2^(d - 1)."""


@triton.jit
def rounded(x, RULE: tl.constexpr, NIBBLES: tl.constexpr):
    """float32 [R, L] -> (values float32 or nibbles int32 [R, L], scale word int32 [G], quarter step float32 of each four).

    A group that is not finite has the word 0xFF, NaN steps and values, zeros as nibbles. RULE: `HiF4.kernel_rule`.
    """
    R: tl.constexpr = x.shape[0]
    L: tl.constexpr = x.shape[1]
    G: tl.constexpr = R * L // 64
    if RULE == MSE:
        groups = tl.reshape(x, (G, 64))
        amax = b.max_abs(
            groups, 1
        )  # in the layout that the tile has: from its parts, the compiler would choose a worse one
        finite = amax.to(tl.int32, bitcast=True) < b.INF_BITS
        y0, y1, y2, y3 = _split_fours(groups)
        byte, e8, exponent = _search(y0, y1, y2, y3, _scale_byte(amax, finite), G)
        quarter = tl.where(finite[:, None], _shifted(e6m2_value(byte)[:, None] * 0.25, exponent), float("nan"))
        factor = _shifted(_reciprocal(byte, False)[:, None] * 4.0, -exponent)
        y0, y1 = _round(y0, factor, quarter, NIBBLES), _round(y1, factor, quarter, NIBBLES)
        y2, y3 = _round(y2, factor, quarter, NIBBLES), _round(y3, factor, quarter, NIBBLES)
        result = tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (R, L))
        exponent = tl.reshape(exponent, (G, 8, 2))
    else:
        fours = tl.reshape(x, (G, 8, 2, 4))
        v16 = b.max_abs(fours, 3)
        v8 = b.max_abs(v16, 2)
        amax = b.max_abs(v8, 1)
        finite = amax.to(tl.int32, bitcast=True) < b.INF_BITS
        if RULE == P2:
            byte, four = _power_of_two(amax)
            four = tl.where(finite, four, float("nan"))  # nothing is larger, and so is every step
            e8 = v8 >= four[:, None]
            limit = tl.where(e8, four[:, None], (four * 0.5)[:, None])[:, :, None]
            e16 = v16 >= limit
            quarter = limit * tl.where(e16, 0.25, 0.125)
            result = _round_in_place(fours, quarter[:, :, :, None], NIBBLES)
        else:
            byte = _scale_byte(amax, finite)
            r = tl.where(finite, _reciprocal(byte, True) * 4.0, 0.0)  # with 0 nothing is raised
            e8 = v8 * r[:, None] >= 16.0
            of_eight = tl.where(e8, (r * 0.5)[:, None], r[:, None])[:, :, None]
            e16 = v16 * of_eight >= 8.0
            factor = of_eight * tl.where(e16, 0.5, 1.0)
            # What the exponents take from the factor's bits, they add to the scale's.
            scale = tl.where(finite, e6m2_value(byte) * 0.25, float("nan")).to(tl.int32, bitcast=True)
            quarter = (scale + r.to(tl.int32, bitcast=True))[:, None, None] - factor.to(tl.int32, bitcast=True)
            quarter = quarter.to(tl.float32, bitcast=True)
            result = _round(fours, factor[:, :, :, None], quarter[:, :, :, None], NIBBLES)
        result = tl.reshape(result, (R, L))
        e8 = e8.to(tl.int32)
        exponent = e8[:, :, None] + e16.to(tl.int32)
    e8_bits = tl.xor_sum(e8 << (8 + tl.arange(0, 8))[None, :], 1)
    place = 16 + 2 * tl.arange(0, 8)[None, :, None] + tl.arange(0, 2)[None, None, :]
    e16_bits = tl.xor_sum(tl.xor_sum((exponent - e8[:, :, None]) << place, 2), 1)
    word = tl.where(finite, byte | e8_bits | e16_bits, 255)
    if NIBBLES:
        result = tl.reshape(tl.where((word == 255)[:, None], 0, tl.reshape(result, (G, 64))), (R, L))
    return result, word, quarter


@triton.jit
def _round(y, factor, quarter, NIBBLES: tl.constexpr):
    """float32 elements with reciprocal and step of their fours -> values or nibbles."""
    level = tl.minimum(b.round_half_up(tl.abs(y) * factor), 7.0)
    if NIBBLES:
        result = _signed(level.to(tl.int32), y)
    else:
        bits = (level * quarter).to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & -2147483648)
        result = bits.to(tl.float32, bitcast=True)
    return result


@triton.jit
def _round_in_place(y, quarter, NIBBLES: tl.constexpr):
    """`_round` with ties to even, by adding and subtracting a number whose ulp is one step; steps are powers of two."""
    magic, largest = quarter * b.NEAREST_INTEGER, quarter * 7.0
    if NIBBLES:
        steps = (tl.abs(y) + magic).to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
        result = _signed(tl.minimum(steps, 7), y)
    else:
        value = tl.minimum((y + magic) - magic, largest, propagate_nan=tl.PropagateNan.ALL)
        result = tl.maximum(value, -largest, propagate_nan=tl.PropagateNan.ALL)
    return result


@triton.jit
def _signed(level, y):
    """Levels int32 -> nibbles; a zero is never signed."""
    return tl.where((y < 0) & (level > 0), level | 8, level)


@triton.jit
def _shifted(x, exponent):
    """float32 x times 2^exponent int32, exact; both x and the result normal."""
    return (x.to(tl.int32, bitcast=True) + (exponent << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(amax):
    """Group maxima float32 [G] -> (E6M2 byte int32 of S = 2^(floor(log2 maximum) - 2) within its limits, 4 S float32)."""
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) - 129
    exponent = tl.minimum(tl.maximum(exponent, -hif4.SCALE_BIAS), hif4.P2_MAX_EXPONENT)
    return (exponent + 48) << 2, b.power_of_two(exponent + 2)


@triton.jit
def _split_fours(groups):
    """float32 [G, 64] -> first, second, third and fourth elements of its fours, [G, 16] each."""
    even, odd = tl.split(tl.reshape(groups, (groups.shape[0], 16, 2, 2)))
    y0, y2 = tl.split(even)
    y1, y3 = tl.split(odd)
    return y0, y1, y2, y3


@triton.jit
def _search(y0, y1, y2, y3, first, G: tl.constexpr):
    """Elements of fours [G, 16] and bytes int32 [G] to start from -> the best byte [G], e8 [G, 8], e8 + e16 [G, 16], int32.

    As `ptq.scheme.hif4`, without its units: squares are finite because no magnitude counts as more than 128 quarters.
    """
    largest = b.power_of_two((first >> 2) - 48 + 5)[:, None]
    y0, y1 = tl.minimum(tl.abs(y0), largest), tl.minimum(tl.abs(y1), largest)
    y2, y3 = tl.minimum(tl.abs(y2), largest), tl.minimum(tl.abs(y3), largest)
    byte = first
    best = tl.full((G,), float("inf"), tl.float32)
    e8 = tl.zeros((G, 8), tl.int32)
    exponent = tl.zeros((G, 16), tl.int32)
    for offset in tl.static_range(MSE_BYTES):
        candidate = first + offset
        r = (_reciprocal(candidate, False) * 4.0)[:, None]
        step = (e6m2_value(candidate) * 0.25)[:, None]
        error0 = _squared_error(y0, y1, y2, y3, r, step, 1.0)
        error1 = _squared_error(y0, y1, y2, y3, r, step, 2.0)
        error2 = _squared_error(y0, y1, y2, y3, r, step, 4.0)
        low = _add_neighbours(tl.minimum(error0, error1))
        high = _add_neighbours(tl.minimum(error1, error2))
        raised = (high < low).to(tl.int32)
        of_16 = tl.reshape(tl.broadcast_to(raised[:, :, None], (G, 8, 2)), (G, 16))
        chosen = of_16 + tl.where(of_16 == 0, error1 < error0, error2 < error1).to(tl.int32)
        error = _sum_of_eights(tl.minimum(low, high))
        better = (error < best) & (candidate < 255)
        best = tl.where(better, error, best)
        byte = tl.where(better, candidate, byte)
        e8 = tl.where(better[:, None], raised, e8)
        exponent = tl.where(better[:, None], chosen, exponent)
    return byte, e8, exponent


@triton.jit
def _squared_error(y0, y1, y2, y3, r, step, POWER: tl.constexpr):
    """Squared error [G, 16] of quads, given as their four elements, with 2^(e8 + e16) = POWER; r and step are [G, 1]."""
    d0, d1 = _difference(y0, r, step, POWER), _difference(y1, r, step, POWER)
    d2, d3 = _difference(y2, r, step, POWER), _difference(y3, r, step, POWER)
    return tl.fma(d0, d0, d1 * d1) + tl.fma(d2, d2, d3 * d3)


@triton.jit
def _difference(y, r, step, POWER: tl.constexpr):
    magic: tl.constexpr = b.NEAREST_INTEGER * POWER  # its ulp is POWER
    return tl.fma(tl.minimum(tl.fma(y, r, magic) - magic, 7.0 * POWER), step, -y)


@triton.jit
def _sum_of_eights(x):
    """[G, 8] -> [G]. The order is the eager function's where that can be told: on a GPU products are fused as well."""
    if b.INTERPRET:
        return tl.reshape(_add_neighbours(_add_neighbours(_add_neighbours(x))), (x.shape[0],))
    return tl.sum(x, 1)


@triton.jit
def _add_neighbours(x):
    """[G, N] -> [G, N / 2]. A sum of two has the same result in any order."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)


@triton.jit
def _scale_byte(amax, finite):
    """Group maximum float32 [G] -> E6M2 byte int32 of bf16(maximum / 7)."""
    maximum = tl.where(finite, amax, 0.0)
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
def e6m2_value(byte):
    """E6M2 bytes int32 -> float32 S; 255 is NaN."""
    bits = (((byte >> 2) + (127 - 48)) << 23) | ((byte & 3) << 21)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def decode(nibbles, words, exponent):
    """Nibbles int32 [R, L] and scale words int32 [R, L/64] -> (levels float32 [R, L], quarter steps float32 [R, L/4]).

    exponent: steps are divided by 2^exponent, int32 [R, 1] or scalar.
    """
    magnitude = (nibbles & 7).to(tl.float32)
    return tl.where(nibbles >= 8, -magnitude, magnitude) + 0.0, _steps(words, exponent)


@triton.jit
def _steps(words, exponent):
    R: tl.constexpr = words.shape[0]
    FOURS: tl.constexpr = words.shape[1] * 16
    four = tl.arange(0, 16)[None, None, :]
    bits = words[:, :, None]
    power = tl.reshape(((bits >> (8 + four // 2)) & 1) + ((bits >> (16 + four)) & 1), (R, FOURS)) - exponent
    scale = tl.broadcast_to(e6m2_value(bits & 0xFF), (R, words.shape[1], 16))
    return tl.reshape(scale * 0.25, (R, FOURS)) * b.power_of_two(power)


@triton.jit
def count_outside(nibbles, quarter, E_REF: tl.constexpr, counters_ptr):
    """Count the groups with non-zero fours above and below the exact range of e5m2 (NaN groups in neither)."""
    bits = quarter.to(tl.int32, bitcast=True)
    j = (bits >> 23) - 127 - E_REF
    used = tl.max(tl.reshape(nibbles, (quarter.shape[0], 8, 2, 4)) & 7, 3) > 0
    above, below = tl.max((used & (j > HIGHEST)).to(tl.int32), 2), tl.max((used & (j < LOWEST)).to(tl.int32), 2)
    b.count(tl.max(above, 1) > 0, tl.max(below, 1) > 0, counters_ptr)


@triton.jit
def store(
    x, start, offset, inside, values_ptr, scales_ptr, counters_ptr,
    L: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, RULE: tl.constexpr, E_REF: tl.constexpr,
):  # fmt: skip
    """Round float32 [ROWS, L] and store it; see `ptq.runtime.kernels.formats.store_tile`."""
    if OUT == "packed":
        nibbles, word, _ = rounded(x, RULE, True)
        b.store_packed(nibbles, tl.reshape(word, (ROWS, L // 64)), start, inside, values_ptr, scales_ptr, L)
    else:
        values, _, _ = rounded(x, RULE, False)
        if OUT == "bf16":
            tl.store(values_ptr + offset, b.to_bf16(values), mask=inside[:, None])
        else:
            tl.static_assert(RULE == P2, "only powers of two are exact in FP8")
            if counters_ptr is not None:
                nibbles, _, quarter = rounded(x, RULE, True)
                count_outside(nibbles, quarter, E_REF, counters_ptr)
            if E_REF != 0:
                values = values * b.power_of_two(tl.full((1, 1), -E_REF, tl.int32))
            tl.store(values_ptr + offset, b.to_e5m2(values), mask=inside[:, None])
