"""Where a kernel becomes one of a format: the switch on the format's id, to decode codes and to store a rounded tile.

A format's device functions are a file beside this one; its id is `Format.kernel_id`.
"""

import triton
import triton.language as tl

from ptq.runtime.kernels import blocks as b
from ptq.runtime.kernels import hif4, mxfp4
from ptq.scheme import get_format

MXFP4 = tl.constexpr(get_format("mxfp4").kernel_id)
HIF4 = tl.constexpr(get_format("hif4").kernel_id)


@triton.jit
def decode_tile(packed, scales, exponent, FORMAT: tl.constexpr):
    """Packed codes uint8 [R, L/2] and their scales [R, L / group] -> float32 [R, L].

    exponent: values are divided by 2^exponent, int32 [R, 1] or scalar.
    """
    R: tl.constexpr = packed.shape[0]
    L: tl.constexpr = packed.shape[1] * 2
    nibbles = b.unpack_nibbles(packed)
    # One result at the end: an early return under a constant condition would still compile what follows it.
    if FORMAT == HIF4:
        values, factor = hif4.decode(nibbles, scales, exponent)
    else:
        tl.static_assert(FORMAT == MXFP4, "no device functions for this format")
        values, factor = mxfp4.decode(nibbles, scales, exponent)
    SHARED: tl.constexpr = L // factor.shape[1]
    return tl.reshape(tl.reshape(values, (R, L // SHARED, SHARED)) * factor[:, :, None], (R, L))


@triton.jit
def store_tile(
    x, start, offset, inside, values_ptr, scales_ptr, counters_ptr,
    FORMAT: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, RULE: tl.constexpr,
    E_REF: tl.constexpr,
):  # fmt: skip
    """Round float32 [ROWS, L], one unit a row, by the format's RULE (`Format.kernel_rule`), and store it as OUT says.

    start: number of each row's first element in the output, int64. offset: of each element in `values_ptr` where it is not
    packed. inside: rows to store.
    """
    if FORMAT == HIF4:
        hif4.store(x, start, offset, inside, values_ptr, scales_ptr, counters_ptr, L, ROWS, OUT, RULE, E_REF)
    else:
        tl.static_assert(FORMAT == MXFP4, "no device functions for this format")
        mxfp4.store(x, start, offset, inside, values_ptr, scales_ptr, counters_ptr, L, ROWS, OUT, RULE, E_REF)


@triton.jit
def round_tile(x, FORMAT: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, RULE: tl.constexpr):
    """float32 [ROWS, L] -> the values that `store_tile` would store, float32 [ROWS, L]."""
    if FORMAT == HIF4:
        values, _, _ = hif4.rounded(x, RULE, False)
    else:
        tl.static_assert(FORMAT == MXFP4, "no device functions for this format")
        values = mxfp4.rounded(x, L, ROWS, RULE)
    return values
