"""Device functions on register tiles that every format needs: products, casts, rotation, nibbles.

They, and those of the formats beside this file, repeat `ptq.scheme` operation by operation on float32 bits, so that codes are equal and not merely close. Where a
result could depend on contraction (a product feeding an addition), the kernels that call these functions are compiled
with `enable_fp_fusion=False`.

INTERPRET is true under TRITON_INTERPRET=1. The interpreter multiplies bfloat16 bit patterns as integers and truncates
float32 -> bfloat16 and float32 -> FP8 instead of rounding, so operands of products stay float32 there and values are
rounded to the target grid before they are cast. The hardware does both in one instruction.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
INF_BITS = tl.constexpr(0x7F800000)
NEAREST_INTEGER = tl.constexpr(12582912.0)
"""1.5 * 2^23: its ulp is 1, so adding and subtracting it rounds to integers; times 2^n, to multiples of 2^n."""


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
def round_half_up(x):
    """floor(x + 0.5) of float32 x >= 0, with both roundings of that expression; meant for x far below 2^22.

    The hardware adds with rounding down, at full rate, where a conversion to an integer would run at a quarter of it.
    """
    if INTERPRET:
        return tl.floor(x + 0.5)
    return libdevice.add_rd(x + 0.5, NEAREST_INTEGER) - NEAREST_INTEGER


@triton.jit
def fused(x, y, z):
    """x * y + z of float32, rounded once."""
    if INTERPRET:
        return (x.to(tl.float64) * y + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, y, z)


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
    """Block Hadamard of [R, L] in blocks of SIZE, times FACTOR (a power of two); see `add_product`."""
    R: tl.constexpr = x.shape[0]
    L: tl.constexpr = x.shape[1]
    blocks = tl.reshape(x, (R * L // SIZE, SIZE))
    total = tl.zeros((R * L // SIZE, SIZE), tl.float32)
    return tl.reshape(add_product(total, blocks, (hadamard_signs(SIZE) * FACTOR).to(tl.bfloat16), PARTS), (R, L))


@triton.jit
def add_product(total, x, matrix, PARTS: tl.constexpr):
    """float32 [R, C] + [R, S] of any float dtype @ bfloat16 [S, C].

    x is split into PARTS bfloat16 summands by truncation, which is exact when PARTS * 8 bits cover the significand of x,
    and each is multiplied on tensor cores: every product is exact, only the float32 sums round. bfloat16 x is one part.
    """
    if x.dtype == tl.bfloat16:
        return dot_f32(x, matrix, total)
    rest = x.to(tl.float32)
    for part_index in tl.static_range(PARTS):
        part = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        total = dot_f32(part.to(tl.bfloat16), matrix, total)
        if part_index + 1 < PARTS:
            rest = rest - part
    return total


@triton.jit
def load_e4m3(ptr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS and COLUMNS from ptr on of a stored block (`ptq.scheme.learned`), float8 e4m3 bits uint8 [SIZE, SIZE] -> bfloat16.

    By integer arithmetic, for devices without that type. Exact: four significant bits.
    """
    bits = tl.load(ptr + tl.arange(0, ROWS)[:, None] * SIZE + tl.arange(0, COLUMNS)[None, :]).to(tl.int32)
    # A sum of one: where bytes become an operand by elementwise operations only, the compiler lays out both operands of `mma.sync`
    # for bytes, which takes four moves a multiplication.
    bits = tl.sum(tl.reshape(bits, (ROWS, COLUMNS, 1)), 2)
    magnitude = bits & 0x7F
    normal = ((magnitude << 20) + (112 << 23)).to(tl.float32, bitcast=True)  # bias 7 -> 127, divided by 256
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 7.62939453125e-06, normal)  # subnormals: 2^-9 / 256
    return tl.where(bits >= 0x80, -value, value).to(tl.bfloat16)


@triton.jit
def load_block(ptr, SIZE: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS from ptr on of a stored block [SIZE, SIZE], as two operands of DEPTH rows, or twice the one of SIZE; bfloat16."""
    upper = load_e4m3(ptr, SIZE, DEPTH, COLUMNS)
    if DEPTH < SIZE:
        return upper, load_e4m3(ptr + DEPTH * SIZE, SIZE, DEPTH, COLUMNS)
    return upper, upper


@triton.jit
def multiply_block(at, mask, block, SIZE: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr):
    """What lies at the pointers [R, DEPTH], and DEPTH elements behind them if that is not SIZE, @ `load_block` -> float32 [R, COLUMNS]."""
    total = tl.zeros((at.shape[0], block[0].shape[1]), tl.float32)
    total = add_product(total, tl.load(at, mask=mask, other=0.0), block[0], PARTS)
    if DEPTH < SIZE:
        total = add_product(total, tl.load(at + DEPTH, mask=mask, other=0.0), block[1], PARTS)
    return total


@triton.jit
def larger(x, y):
    """The larger magnitude of two float32, a NaN where either is one."""
    return tl.maximum(tl.abs(x), tl.abs(y), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_abs(x, AXIS: tl.constexpr):
    """Largest magnitude of float32 x along an axis: a NaN, whose bits are above those of every other, where there is one.

    By float comparisons, which take the sign away for free.
    """
    if INTERPRET:
        return tl.max(magnitude_bits(x), AXIS).to(tl.float32, bitcast=True)
    return tl.reduce(tl.abs(x), AXIS, larger)


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
def count(above, below, counters_ptr):
    """Add the true ones among bool above and below (of any shape) to int32 counters [2]."""
    tl.atomic_add(counters_ptr, tl.sum(above.to(tl.int32), 0), sem="relaxed")
    tl.atomic_add(counters_ptr + 1, tl.sum(below.to(tl.int32), 0), sem="relaxed")


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
def store_packed(nibbles, scales, start, inside, values_ptr, scales_ptr, L: tl.constexpr):
    """Nibbles int32 [R, L] and scales [R, L / group], the elements of each row from `start` on, in a checkpoint's layout."""
    half: tl.constexpr = L // 2
    groups: tl.constexpr = scales.shape[1]
    first = start[:, None]
    values_at = values_ptr + first // 2 + tl.arange(0, half)[None, :]
    scales_at = scales_ptr + first // (L // groups) + tl.arange(0, groups)[None, :]
    tl.store(values_at, pack_nibbles(nibbles), mask=inside[:, None])
    tl.store(scales_at, scales, mask=inside[:, None])
