"""Device functions on register tiles: rotation, MXFP4 rounding, nibbles, decoding. Shared by the kernels of this folder.

They repeat `ptq.scheme` operation by operation on float32 bits, so that codes are equal and not merely close. Where a
result could depend on contraction (a product feeding an addition), the kernels that call these functions are compiled
with `enable_fp_fusion=False`.

INTERPRET is true under TRITON_INTERPRET=1. The interpreter multiplies bfloat16 bit patterns as integers and truncates
float32 -> bfloat16 and float32 -> FP8 instead of rounding, so operands of products stay float32 there and values are
rounded to the target grid before they are cast. The hardware does both in one instruction.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def dot_f32(a, b, acc):
    """acc + a @ b with float32 accumulation; operands of a tensor-core dtype, upcast in the interpreter.

    `max_num_imprecise_acc` stays at its default on purpose: 0 would turn FP8 into float16 multiplication on sm_90.
    """
    if INTERPRET:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        result = tl.dot(a, b, acc)
    return result


@triton.jit
def to_bf16(x):
    """float32 -> bfloat16, nearest even, infinities and NaN kept."""
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        finite = (bits & 0x7FFFFFFF) < INF_BITS
        return tl.where(finite, rounded, bits).to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(tl.bfloat16)


@triton.jit
def cast_output(x, dtype: tl.constexpr):
    """float32 -> the output dtype of a matrix product, nearest even."""
    if dtype == tl.bfloat16:
        return to_bf16(x)
    return x.to(dtype)


@triton.jit
def to_e5m2(x):
    """float32 E2M1 * 2^d -> e5m2: exact for d in [-15, 13], otherwise nearest even below and saturated above."""
    if INTERPRET:
        # 1.5 * 2^7 has an ulp of 2^-16, the smallest e5m2 step; below 2^-14 that is the e5m2 grid.
        small = (x + 192.0) - 192.0
        grid = tl.where(tl.abs(x) < 6.103515625e-05, small, x)
        grid = tl.minimum(tl.maximum(grid, -57344.0), 57344.0)
        encoded = grid.to(tl.float8e5).to(tl.uint8, bitcast=True)
        return tl.where(x == x, encoded, 0x7F).to(tl.float8e5, bitcast=True)
    return x.to(tl.float8e5)


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32 for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def hadamard_signs(SIZE: tl.constexpr):
    """The +-1 Sylvester matrix, float32 [SIZE, SIZE]: the sign is the parity of the bits that row and column share."""
    index = tl.arange(0, SIZE)
    parity = index[:, None] & index[None, :]
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    return (1 - 2 * (parity & 1)).to(tl.float32)


@triton.jit
def rotate(x, SIZE: tl.constexpr, FACTOR: tl.constexpr, PARTS: tl.constexpr):
    """Block Hadamard of float32 [R, L] in blocks of SIZE, times FACTOR (a power of two); see `multiply_block`."""
    R: tl.constexpr = x.shape[0]
    L: tl.constexpr = x.shape[1]
    blocks = tl.reshape(x, (R * L // SIZE, SIZE))
    return tl.reshape(multiply_block(blocks, (hadamard_signs(SIZE) * FACTOR).to(tl.bfloat16), PARTS), (R, L))


@triton.jit
def multiply_block(x, matrix, PARTS: tl.constexpr):
    """float32 [R, S] @ bfloat16 [S, S].

    x is split into PARTS bfloat16 summands by truncation, which is exact when PARTS * 8 bits cover the significand of x,
    and each is multiplied on tensor cores: every product is exact, only the float32 sums round.
    """
    rest = x
    total = tl.zeros(x.shape, tl.float32)
    for part_index in tl.static_range(PARTS):
        part = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        total = dot_f32(part.to(tl.bfloat16), matrix, total)
        if part_index + 1 < PARTS:
            rest = rest - part
    return total


@triton.jit
def load_e4m3(ptr, SIZE: tl.constexpr):
    """A stored block (`ptq.scheme.learned`), float8 e4m3 bits uint8 [SIZE, SIZE] -> its values in bfloat16.

    By integer arithmetic, for devices without that type. Exact: four significant bits.
    """
    index = tl.arange(0, SIZE)
    bits = tl.load(ptr + index[:, None] * SIZE + index[None, :]).to(tl.int32)
    magnitude = bits & 0x7F
    normal = ((magnitude << 20) + (112 << 23)).to(tl.float32, bitcast=True)  # bias 7 -> 127, divided by 256
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 7.62939453125e-06, normal)  # subnormals: 2^-9 / 256
    return tl.where(bits >= 0x80, -value, value).to(tl.bfloat16)


@triton.jit
def magnitude_bits(x):
    """Bits of |x| as int32: ordered like |x|, with infinities and NaN above every finite value."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def with_sign_of(magnitude, x):
    """|magnitude| with the sign of x, zeros always +0 (float32)."""
    bits = magnitude.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True) + 0.0


@triton.jit
def e2m1_round(y, AWAY: tl.constexpr):
    """Nearest E2M1 values of float32 y, saturating at 6, signs included.

    Nearest even adds and subtracts 1.5 * 2^(e + 22) for y in binade e: its ulp is the E2M1 step of that binade. Seven
    instructions an element, where comparing with thresholds would need twice as many.
    """
    binade = tl.maximum(y.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    if AWAY:
        binade = tl.minimum(binade, 0x40800000)
        inverse = (0x7F800000 - binade).to(tl.float32, bitcast=True)  # 2 / binade
        level = tl.floor(tl.abs(y) * inverse + 0.5)
        rounded = with_sign_of(level * binade.to(tl.float32, bitcast=True) * 0.5, y)
    else:
        magic = (binade + 0x0B400000).to(tl.float32, bitcast=True)
        rounded = (y + magic) - magic
    return tl.minimum(tl.maximum(rounded, -6.0), 6.0)


@triton.jit
def mxfp4_values(groups, byte, AWAY: tl.constexpr):
    """E2M1 values of float32 [G, 32] in units of their scales, bytes int32 [G] (garbage where not finite)."""
    return e2m1_round(groups * _reciprocal(byte)[:, None], AWAY)


@triton.jit
def _reciprocal(byte):
    return (tl.maximum(254 - byte, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_value(byte):
    """E8M0 bytes int32 -> float32 2^(byte - 127); 0 is the subnormal 2^-127, 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def mxfp4_scales(groups, CARRY: tl.constexpr, MSE: tl.constexpr, AWAY: tl.constexpr):
    """Scale bytes int32 [G] of float32 groups [G, 32]; 255 where a group is not finite."""
    amax = tl.max(magnitude_bits(groups), 1)
    byte = tl.minimum(tl.maximum(((amax + CARRY) >> 23) - 2, 0), 252)
    if MSE:
        y = groups * _reciprocal(byte)[:, None]
        error = e2m1_round(y, AWAY) - y
        raised = e2m1_round(y * 0.5, AWAY) * 2.0 - y
        better = tl.sum(raised * raised, 1) < tl.sum(error * error, 1)
        byte = tl.where(better & (byte < 252), byte + 1, byte)
    return tl.where(amax < INF_BITS, byte, 255)


@triton.jit
def e2m1_nibbles(values):
    """E2M1 values float32 (any of +-{0, .5, 1, 1.5, 2, 3, 4, 6}) -> nibbles int32."""
    bits = magnitude_bits(values)
    # From 1.0 on, exponent and first mantissa bit count the index up: 1.0 is 254, 1.5 is 255, ..., index 2, 3, ...
    index = tl.where(bits >= 0x3F800000, (bits >> 22) - 252, tl.where(bits == 0, 0, 1))
    return tl.where(values < 0, index | 8, index)


@triton.jit
def e2m1_values(nibbles):
    """Nibbles int32 -> E2M1 values float32; the nibble 8 is +0."""
    index = nibbles & 7
    magnitude = ((index + 252) << 22).to(tl.float32, bitcast=True)
    magnitude = tl.where(index < 2, index.to(tl.float32) * 0.5, magnitude)
    return tl.where((nibbles >= 8) & (index > 0), -magnitude, magnitude)


@triton.jit
def e6m2_value(byte):
    """E6M2 bytes int32 -> float32 S; 255 is NaN."""
    bits = (((byte >> 2) + (127 - 48)) << 23) | ((byte & 3) << 21)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def pack_nibbles(nibbles):
    """int32 [R, L] -> uint8 [R, L/2], even elements in the low nibble."""
    R: tl.constexpr = nibbles.shape[0]
    L: tl.constexpr = nibbles.shape[1]
    low, high = tl.split(tl.reshape(nibbles, (R, L // 2, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def unpack_nibbles(packed):
    """uint8 [R, L] -> int32 nibbles [R, 2 L]."""
    byte = packed.to(tl.int32)
    return tl.interleave(byte & 15, byte >> 4)


@triton.jit
def mxfp4_scaled(values, byte, E_REF: tl.constexpr):
    """E2M1 values float32 [G, 32] -> values * 2^(byte - 127 - E_REF), NaN where the byte is 255."""
    factor = power_of_two(tl.minimum(tl.maximum(byte - 127 - E_REF, -126), 120))
    return values * tl.where(byte == 255, float("nan"), factor)[:, None]


@triton.jit
def count_outside(values, byte, E_REF: tl.constexpr, counters_ptr):
    """Add to int32 counters [2] the non-zero blocks above and below the exact range of e5m2 (NaN blocks in neither)."""
    exponent = byte - 127 - E_REF
    used = (tl.max(tl.abs(values), 1) > 0) & (byte != 255)
    tl.atomic_add(counters_ptr, tl.sum((used & (exponent > 13)).to(tl.int32), 0), sem="relaxed")
    tl.atomic_add(counters_ptr + 1, tl.sum((used & (exponent < -15)).to(tl.int32), 0), sem="relaxed")


@triton.jit
def hif4_steps(word, LENGTH: tl.constexpr):
    """Scale words int32 [R, LENGTH / 64] -> quarter steps float32 [R, LENGTH / 4], one for each four elements."""
    R: tl.constexpr = word.shape[0]
    quad = tl.arange(0, 16)[None, None, :]
    bits = word[:, :, None]
    exponent = ((bits >> (8 + quad // 2)) & 1) + ((bits >> (16 + quad)) & 1)
    steps = e6m2_value(bits & 0xFF) * 0.25 * power_of_two(exponent)
    return tl.reshape(steps, (R, LENGTH // 4))


@triton.jit
def decode_tile(packed, scales, exponent, HIF4: tl.constexpr):
    """Packed codes uint8 [R, L/2] and their scales -> float32 [R, L].

    MXFP4: scales uint8 [R, L/32], values divided by 2^exponent (int32 [R, 1] or scalar). HiF4: words int32 [R, L/64].
    """
    R: tl.constexpr = packed.shape[0]
    L: tl.constexpr = packed.shape[1] * 2
    nibbles = unpack_nibbles(packed)
    # One result at the end: an early return under a constant condition would still compile what follows it.
    if HIF4:
        magnitude = (nibbles & 7).to(tl.float32)
        values = tl.where(nibbles >= 8, -magnitude, magnitude) + 0.0
        factor = hif4_steps(scales, L)
    else:
        byte = scales.to(tl.int32)
        values = e2m1_values(nibbles)
        factor = power_of_two(tl.minimum(tl.maximum(byte - 127 - exponent, -126), 120))
        factor = tl.where(byte == 255, float("nan"), factor)
    SHARED: tl.constexpr = L // factor.shape[1]
    return tl.reshape(tl.reshape(values, (R, L // SHARED, SHARED)) * factor[:, :, None], (R, L))
