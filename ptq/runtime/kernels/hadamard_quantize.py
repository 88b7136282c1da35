"""Quantize activations in one pass over memory: smooth and block Hadamard, or learned blocks; then MXFP4 or HiF4.

Three outputs: packed codes and scales (for block-scaled tensor cores), FP8 e5m2 (for `gemm_fp8`), bfloat16 (exact for
both formats, for bfloat16 products). FP8 needs one static reference exponent instead of a second pass: see
`ptq.runtime.exactness` for the range in which it is exact and for the counters of blocks outside it.

Codes equal those of `QuantSpec.quantize_input` wherever the rotation's float32 sums are exact. Where a sum rounds, its
last bit depends on the order of summation, and an element that lies within that bit of a rounding threshold can get the
neighbouring code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq import formats
from ptq.runtime.kernels import blocks as b
from ptq.runtime.kernels.blocks_hif4 import hif4_convert, hif4_nibbles
from ptq.runtime.spec import QuantSpec
from ptq.scheme import rotation_scales
from ptq.scheme.mxfp4 import EXPONENT_CARRY

Output = Literal["packed", "fp8", "bf16"]
TILE_ELEMENTS = 4096
NUM_WARPS = 4
COMPILE_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


@dataclass(frozen=True)
class QuantizedInput:
    """Activations on the format's grid.

    Attributes:
        values: [M, K/2] uint8 nibbles ("packed"), [M, K] float8_e5m2 in units of 2^e_ref ("fp8") or bfloat16 ("bf16").
        scales: [M, K/group] as in a checkpoint, for "packed" only.
        e_ref: reference exponent of "fp8" (0 otherwise).
    """

    values: Tensor
    scales: Tensor | None
    e_ref: int = 0


def hadamard_quantize(
    x: Tensor, basis: Tensor | None, spec: QuantSpec, out: Output, *, e_ref: int = 0, counters: Tensor | None = None
) -> QuantizedInput:
    """Change the basis of activations and quantize them.

    Args:
        x: bfloat16, float16 or float32 [M, K]; rows may be strided, the last dimension is made contiguous.
        basis: `smooth` bfloat16 [K], `transform` uint8 [K/B, B, B] or None, as the spec says.
        spec: format, change of basis, scale rule, ties.
        out: what to write; "fp8" exists for MXFP4 only.
        e_ref: "fp8" holds value / 2^e_ref.
        counters: int32 [2] on the device; the number of blocks saturated and underflowed in "fp8" is added to it.

    Raises:
        FormatError: "fp8" asked for HiF4, whose scales have mantissas.
    """
    check_output(spec, out)
    m, k = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    fmt = formats.get(spec.format)
    shape, dtype = ((m, k // 2), torch.uint8) if out == "packed" else ((m, k), OUTPUT_DTYPES[out])
    values = torch.empty(shape, dtype=dtype, device=x.device)
    packed_scales = out == "packed"
    scales = torch.empty((m, k // fmt.group_size), dtype=fmt.scale_dtype, device=x.device) if packed_scales else None
    if m:
        unit = unit_length(spec)
        rows = TILE_ELEMENTS // unit
        tiles = triton.cdiv(m, rows) * (k // unit) if spec.learned else triton.cdiv(m * (k // unit), rows)
        basis = basis if basis is None else basis.contiguous()
        arguments = (x, basis, values, scales, counters, m * (k // unit), x.stride(0))
        fixed = constants(spec, out, x.dtype, basis is not None and not spec.learned, k, e_ref)
        quantize_kernel[(tiles,)](*arguments, **fixed, **COMPILE_OPTIONS)
    return QuantizedInput(values, scales, e_ref if out == "fp8" else 0)


def hadamard_quantize_reference(
    x: Tensor, basis: Tensor | None, spec: QuantSpec, out: Output, *, e_ref: int = 0
) -> QuantizedInput:
    """The same in torch, from `ptq.scheme` and `ptq.scheme`. Same arguments, result and errors."""
    check_output(spec, out)
    if out == "packed":
        fmt = formats.get(spec.format)
        transformed = spec.transform_input(x.float(), basis)
        return QuantizedInput(*fmt.pack(fmt.quantize(transformed, scale_rule=spec.scale_rule, ties=spec.ties)))
    values = spec.quantize_input(x, basis)
    if out == "bf16":
        return QuantizedInput(values.to(torch.bfloat16), None)
    return QuantizedInput((values * 2.0**-e_ref).clamp(-57344.0, 57344.0).to(torch.float8_e5m2), None, e_ref)


OUTPUT_DTYPES = {"fp8": torch.float8_e5m2, "bf16": torch.bfloat16}


def check_output(spec: QuantSpec, out: Output) -> None:
    """Raise FormatError where `spec` has no exact `out`."""
    if out == "fp8" and spec.format != "mxfp4":
        raise formats.FormatError(f"{spec.format} activations are not exact in FP8; ask for bf16 or packed.")


def unit_length(spec: QuantSpec) -> int:
    """Elements that must stay together in one row of a tile: a rotation block or a group, whichever is longer."""
    return max(spec.rotation, formats.get(spec.format).group_size)


def significand_parts(dtype: torch.dtype, smooth: bool) -> int:
    """bfloat16 summands that hold x * smooth exactly (8 bits each; float32 has 24)."""
    bits = {torch.bfloat16: 8, torch.float16: 11}.get(dtype, 24) + (8 if smooth else 0)
    return min(3, -(-bits // 8))


def constants(spec: QuantSpec, out: Output, dtype: torch.dtype, smooth: bool, k: int, e_ref: int) -> dict[str, object]:
    """Compile-time arguments of `quantize_kernel` for one specification and row length."""
    fmt = formats.get(spec.format)
    rule = spec.scale_rule or fmt.scale_rules[0]
    unit = unit_length(spec)
    return {
        "K": k,
        "L": unit,
        "ROWS": TILE_ELEMENTS // unit,
        "HIF4": spec.format == "hif4",
        "OUT": out,
        "ROTATION": 0 if spec.learned else spec.rotation,
        "LEARNED": spec.learned,
        "FACTOR": rotation_scales(spec.rotation)[0] if spec.rotation else 1.0,
        "PARTS": significand_parts(dtype, smooth),
        "CARRY": EXPONENT_CARRY.get(rule, 0),
        "MSE": rule == "mse",
        "AWAY": (spec.ties or fmt.ties_options[0]) == "away",
        "E_REF": e_ref,
    }


@triton.jit
def quantize_kernel(
    x_ptr,
    basis_ptr,
    values_ptr,
    scales_ptr,
    counters_ptr,
    units,
    stride_m,
    K: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    HIF4: tl.constexpr,
    OUT: tl.constexpr,
    ROTATION: tl.constexpr,
    LEARNED: tl.constexpr,
    FACTOR: tl.constexpr,
    PARTS: tl.constexpr,
    CARRY: tl.constexpr,
    MSE: tl.constexpr,
    AWAY: tl.constexpr,
    E_REF: tl.constexpr,
):
    """One tile of ROWS units; a unit is L consecutive elements of a row, and rows hold K / L units.

    Units of a tile follow each other along rows; with LEARNED they lie in one column of units, which share a matrix.
    """
    if LEARNED:
        block = tl.program_id(0) % (K // L)
        unit = (tl.program_id(0) // (K // L) * ROWS + tl.arange(0, ROWS)) * (K // L) + block
    else:
        unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = unit < units
    row = unit // (K // L)
    column = (unit % (K // L))[:, None] * L + tl.arange(0, L)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * stride_m + column, mask=inside[:, None], other=0.0).to(tl.float32)
    if LEARNED:
        x = b.multiply_block(x, b.load_e4m3(basis_ptr + block * L * L, L), PARTS)
    elif basis_ptr is not None:
        x = x * tl.load(basis_ptr + column, mask=inside[:, None], other=0.0).to(tl.float32)
    if ROTATION > 0:
        x = b.rotate(x, ROTATION, FACTOR, PARTS)
    offset = row.to(tl.int64)[:, None] * K + column
    if HIF4:
        _store_hif4(x, unit, offset, inside, values_ptr, scales_ptr, L, ROWS, OUT, MSE, AWAY)
    else:
        _store_mxfp4(
            x, unit, offset, inside, values_ptr, scales_ptr, counters_ptr, L, ROWS, OUT, CARRY, MSE, AWAY, E_REF
        )


@triton.jit
def _store_hif4(
    x, unit, offset, inside, values_ptr, scales_ptr,
    L: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, MSE: tl.constexpr, AWAY: tl.constexpr,
):  # fmt: skip
    level, quarter, word = hif4_convert(x, MSE, EVEN=not AWAY)
    if OUT == "packed":
        nibbles = tl.reshape(hif4_nibbles(level, word, x), (ROWS, L))
        _store_packed(nibbles, tl.reshape(word, (ROWS, L // 64)), unit, inside, values_ptr, scales_ptr, L)
    else:
        magnitude = tl.reshape(level * quarter[:, :, None], (ROWS, L))
        tl.store(values_ptr + offset, b.to_bf16(b.with_sign_of(magnitude, x)), mask=inside[:, None])


@triton.jit
def _store_mxfp4(
    x, unit, offset, inside, values_ptr, scales_ptr, counters_ptr,
    L: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, CARRY: tl.constexpr, MSE: tl.constexpr,
    AWAY: tl.constexpr, E_REF: tl.constexpr,
):  # fmt: skip
    groups = tl.reshape(x, (ROWS * L // 32, 32))
    byte = b.mxfp4_scales(groups, CARRY, MSE, AWAY)
    value = b.mxfp4_values(groups, byte, AWAY)
    if OUT == "packed":
        value = tl.where((byte == 255)[:, None], 0.0, value)
        nibbles = tl.reshape(b.e2m1_nibbles(value), (ROWS, L))
        scales = tl.reshape(byte, (ROWS, L // 32)).to(tl.uint8)
        _store_packed(nibbles, scales, unit, inside, values_ptr, scales_ptr, L)
    elif OUT == "bf16":
        value = tl.reshape(value * b.e8m0_value(byte)[:, None], (ROWS, L))
        tl.store(values_ptr + offset, b.to_bf16(value), mask=inside[:, None])
    else:
        if counters_ptr is not None:
            b.count_outside(value, byte, E_REF, counters_ptr)
        value = tl.reshape(b.mxfp4_scaled(value, byte, E_REF), (ROWS, L))
        tl.store(values_ptr + offset, b.to_e5m2(value), mask=inside[:, None])


@triton.jit
def _store_packed(nibbles, scales, unit, inside, values_ptr, scales_ptr, L: tl.constexpr):
    half: tl.constexpr = L // 2
    per_unit: tl.constexpr = scales.shape[1]
    base = unit.to(tl.int64)[:, None]
    tl.store(values_ptr + base * half + tl.arange(0, half)[None, :], b.pack_nibbles(nibbles), mask=inside[:, None])
    tl.store(scales_ptr + base * per_unit + tl.arange(0, per_unit)[None, :], scales, mask=inside[:, None])
