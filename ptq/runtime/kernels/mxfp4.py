"""Device functions that round register tiles to MXFP4 and decode it: `ptq.scheme.mxfp4`, operation by operation."""

import triton
import triton.language as tl

from ptq.runtime.kernels import blocks as b
from ptq.scheme.mxfp4 import EXPONENT_CARRY

EVEN, CEIL = tl.constexpr(EXPONENT_CARRY["even"]), tl.constexpr(EXPONENT_CARRY["ceil"])


@triton.jit
def e2m1_round(y):
    """Nearest E2M1 values of float32 y, saturating at 6, signs included.

    Nearest even adds and subtracts 1.5 * 2^(e + 22) for y in binade e: its ulp is the E2M1 step of that binade. Seven
    instructions an element, where comparing with thresholds would need twice as many.
    """
    binade = tl.maximum(y.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    magic = (binade + 0x0B400000).to(tl.float32, bitcast=True)
    rounded = (y + magic) - magic
    return tl.minimum(tl.maximum(rounded, -6.0), 6.0)


@triton.jit
def round_groups(groups, byte):
    """E2M1 values of float32 [G, 32] in units of their scales, bytes int32 [G] (garbage where not finite)."""
    return e2m1_round(groups * _reciprocal(byte)[:, None])


@triton.jit
def round_in_place(groups, RULE: tl.constexpr, E_REF: tl.constexpr):
    """float32 [G, 32] -> values / 2^E_REF, for an e5m2 output; NaN where a group is not finite.

    As `e2m1_round`, but what is added and subtracted, 1.5 * 2^22 times the binade of an element as it is, has an ulp of the
    E2M1 step there, so nothing is scaled. It is a factor of fused operations. Below 2^-126, where a binade would be subnormal,
    all becomes 0 in e5m2 anyway. In a block with a maximum of 2^104 or more, where it could be beyond float32, nothing is added:
    what is not rounded there saturates, or would have been 0.
    """
    unit = _units(groups, RULE)
    binade = b.larger(groups, unit[:, None]).to(tl.int32, bitcast=True) & 0x7F800000  # of a NaN: infinity
    binade = binade.to(tl.float32, bitcast=True)
    magic = tl.where(unit < 2.0**102, 6291456.0, 0.0)[:, None]
    value = b.fused(-binade, magic, b.fused(binade, magic, groups))
    # `even` and `ceil` leave a maximum that rounds to 6 (in range; beyond it e5m2 saturates), the others one up to 8.
    if (RULE != EVEN and RULE != CEIL) or E_REF != 0:
        largest = unit[:, None] * 6.0
        value = tl.minimum(value, largest, propagate_nan=tl.PropagateNan.ALL)
        value = tl.maximum(value, -largest, propagate_nan=tl.PropagateNan.ALL)
    if E_REF != 0:
        value = value * b.power_of_two(tl.full((1, 1), -E_REF, tl.int32))
    return value


@triton.jit
def _units(groups, RULE: tl.constexpr):
    """Scales of float32 groups [G, 32], at least 2^-126, for `round_in_place`: float32 [G], NaN where a group is not finite."""
    if RULE < 0:
        byte = scale_bytes(groups, RULE)
        bits = tl.where(byte == 255, 0x7FC00000, tl.maximum(byte, 1) << 23)
    else:  # `scale_bytes` without the shifts; from a maximum of 2^107 on everything saturates, whatever the scale
        amax = b.max_abs(groups, 1).to(tl.int32, bitcast=True)
        bits = tl.maximum(amax + (RULE - (2 << 23)), 1 << 23) & 0x7F800000
        bits = tl.where(amax < b.INF_BITS, bits, 0x7FC00000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal(byte):
    return (tl.maximum(254 - byte, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_value(byte):
    """E8M0 bytes int32 -> float32 2^(byte - 127); 0 is the subnormal 2^-127, 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def scale_bytes(groups, RULE: tl.constexpr):
    """Scale bytes int32 [G] of float32 groups [G, 32]; 255 where a group is not finite. RULE: `MXFP4.kernel_rule`."""
    MSE: tl.constexpr = RULE < 0
    CARRY: tl.constexpr = 0 if MSE else RULE
    amax = b.max_abs(groups, 1).to(tl.int32, bitcast=True)
    byte = tl.minimum(tl.maximum(((amax + CARRY) >> 23) - 2, 0), 252)
    if MSE:
        y = groups * _reciprocal(byte)[:, None]
        error = e2m1_round(y) - y
        raised = e2m1_round(y * 0.5) * 2.0 - y
        better = tl.sum(raised * raised, 1) < tl.sum(error * error, 1)
        byte = tl.where(better & (byte < 252), byte + 1, byte)
    return tl.where(amax < b.INF_BITS, byte, 255)


@triton.jit
def rounded(x, L: tl.constexpr, ROWS: tl.constexpr, RULE: tl.constexpr):
    """float32 [ROWS, L] -> its values on the grid, float32 [ROWS, L]."""
    groups = tl.reshape(x, (ROWS * L // 32, 32))
    byte = scale_bytes(groups, RULE)
    return tl.reshape(round_groups(groups, byte) * e8m0_value(byte)[:, None], (ROWS, L))


@triton.jit
def e2m1_nibbles(values):
    """E2M1 values float32 (any of +-{0, .5, 1, 1.5, 2, 3, 4, 6}) -> nibbles int32."""
    bits = b.magnitude_bits(values)
    # From 1.0 on, exponent and first mantissa bit count the index up: 1.0 is 254, 1.5 is 255, ..., index 2, 3, ...
    index = tl.where(bits >= 0x3F800000, (bits >> 22) - 252, tl.where(bits == 0, 0, 1))
    return tl.where(values < 0, index | 8, index)


@triton.jit
def decode(nibbles, scales, exponent):
    """Nibbles int32 [R, L] and scale bytes [R, L/32] -> (E2M1 values float32 [R, L], factors / 2^exponent float32 [R, L/32]).

    exponent: int32 [R, 1] or scalar. The nibble 8 is +0.
    """
    index = nibbles & 7
    magnitude = ((index + 252) << 22).to(tl.float32, bitcast=True)
    magnitude = tl.where(index < 2, index.to(tl.float32) * 0.5, magnitude)
    byte = scales.to(tl.int32)
    factor = b.power_of_two(tl.minimum(tl.maximum(byte - 127 - exponent, -126), 120))
    return tl.where((nibbles >= 8) & (index > 0), -magnitude, magnitude), tl.where(byte == 255, float("nan"), factor)


@triton.jit
def count_outside(values, byte, E_REF: tl.constexpr, counters_ptr):
    """Count the non-zero blocks above and below the exact range of e5m2 (NaN blocks in neither)."""
    exponent = byte - 127 - E_REF
    used = (tl.max(tl.abs(values), 1) > 0) & (byte != 255)
    b.count(used & (exponent > 13), used & (exponent < -15), counters_ptr)


@triton.jit
def store(
    x, start, offset, inside, values_ptr, scales_ptr, counters_ptr,
    L: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, RULE: tl.constexpr, E_REF: tl.constexpr,
):  # fmt: skip
    """Round float32 [ROWS, L] and store it; see `ptq.runtime.kernels.formats.store_tile`."""
    groups = tl.reshape(x, (ROWS * L // 32, 32))
    if OUT == "packed":
        byte = scale_bytes(groups, RULE)
        value = tl.where((byte == 255)[:, None], 0.0, round_groups(groups, byte))
        nibbles = tl.reshape(e2m1_nibbles(value), (ROWS, L))
        scales = tl.reshape(byte, (ROWS, L // 32)).to(tl.uint8)
        b.store_packed(nibbles, scales, start, inside, values_ptr, scales_ptr, L)
    elif OUT == "bf16":
        value = rounded(x, L, ROWS, RULE)
        tl.store(values_ptr + offset, b.to_bf16(value), mask=inside[:, None])
    else:
        if counters_ptr is not None:
            byte = scale_bytes(groups, RULE)
            count_outside(round_groups(groups, byte), byte, E_REF, counters_ptr)
        value = tl.reshape(round_in_place(groups, RULE, E_REF), (ROWS, L))
        tl.store(values_ptr + offset, b.to_e5m2(value), mask=inside[:, None])
