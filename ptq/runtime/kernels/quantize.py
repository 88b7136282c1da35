"""Quantize activations in one pass over memory: change of basis (smoothing and block Hadamard, or learned blocks), then round.

Three outputs: packed codes and scales (for block-scaled tensor cores), FP8 e5m2 (for `gemm_fp8`), bfloat16 (exact for
every format, for bfloat16 products). FP8 needs one static reference exponent instead of a second pass: see
`ptq.scheme.placement` for the range in which it is exact; counters tell how many blocks were outside it.

Codes equal those of `Scheme.quantize_input` wherever the rotation's float32 sums are exact. Where a sum rounds, its
last bit depends on the order of summation, and an element that lies within that bit of a rounding threshold can get the
neighbouring code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.known import RESIDUAL_BLOCK
from ptq.runtime.kernels import blocks as b
from ptq.runtime.kernels import formats as f
from ptq.runtime.kernels.residual import parts_of, residual_kernel
from ptq.runtime.kernels.tiles import capability_family
from ptq.scheme import Format, FormatError, Hadamard, HiF4, Scheme
from ptq.scheme.format import EMPTY
from ptq.scheme.hadamard import rotation_factors
from ptq.scheme.placement import E5M2_RANGE, E_REF
from ptq.scheme.residual import columns

Output = Literal["packed", "fp8", "bf16"]
OUTPUT_DTYPES = {"packed": torch.uint8, "fp8": torch.float8_e5m2, "bf16": torch.bfloat16}
TILE_ELEMENTS = 4096
STEPS = 8
"""Tiles that a program walks, one under the other: what belongs to their columns is loaded once for all of them."""
MANY_ROWS = 4096
"""From so many rows on; with fewer a program takes one tile, or there would be too few programs."""
WARPS = 4
WIDE_TILE, WIDE_WARPS = 8192, 8
"""With units of 128: 64 rows of them, the fewest of the matrix instructions that several warps issue together."""
WHOLE = (90, 100)
"""Capability families that have these. Elsewhere a unit of 128 would lie across warps, and HiF4's `mse` spill registers: there
a program takes PANEL columns of a learned block, and reads the block's input once for each panel. It also multiplies by a block
in two halves of its depth, because the compiler gives each warp whole rows only where one product goes on with another's sum."""
PANEL = 64
SMALL_TILE, SMALL_TILE_WARPS = 2048, 8
"""Where HiF4's `mse` writes packed codes, which spills registers with more elements a thread."""


@dataclass(frozen=True)
class QuantizedInput:
    """Activations on the format's grid.

    Attributes:
        values: [M, K/2] uint8 nibbles ("packed"), [M, K] float8_e5m2 in units of 2^e_ref ("fp8") or bfloat16 ("bf16"); with
            residual blocks K is wider, see `Scheme.quantize_input`.
        scales: [M, K/group] as in a checkpoint, for "packed" only.
        e_ref: reference exponent of "fp8" (0 otherwise).
    """

    values: Tensor
    scales: Tensor | None
    e_ref: int = 0


def quantize(
    x: Tensor,
    basis: Tensor | None,
    scheme: Scheme,
    out: Output,
    *,
    residual: Sequence[int] = (),
    e_ref: int = 0,
    counters: Tensor | None = None,
) -> QuantizedInput:
    """Change the basis of activations and quantize them.

    Args:
        x: bfloat16, float16 or float32 [M, K]; rows may be strided, the last dimension is made contiguous.
        basis: what the scheme's transform stores, or None.
        out: what to write.
        residual: numbers of the blocks whose residual is written behind the row.
        e_ref: "fp8" holds value / 2^e_ref.
        counters: int32 [2] on the device; the number of blocks saturated and underflowed in "fp8" is added to it.

    Raises:
        FormatError: "fp8" asked for inputs that are not exact in FP8.
    """
    check_output(scheme, out)
    m, k = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    fmt, width = scheme.format, k + RESIDUAL_BLOCK * len(residual)
    values = torch.empty((m, width // 2 if out == "packed" else width), dtype=OUTPUT_DTYPES[out], device=x.device)
    scale_shape = (m, width // fmt.group_size)
    scales = torch.empty(scale_shape, dtype=fmt.scale_dtype, device=x.device) if out == "packed" else None
    if m:
        chosen = constants(scheme, out, x.dtype, k, e_ref, m, capability_family(x.device))
        unit, rows = chosen["L"], chosen["ROWS"] * chosen["STEPS"]
        grid = (triton.cdiv(m, rows) * (k // unit) if chosen["BLOCK"] else triton.cdiv(m * (k // unit), rows),)
        basis = basis if basis is None else basis.contiguous()
        arguments = (x, basis, values, scales, counters, m, x.stride(0), width)
        quantize_kernel[grid](*arguments, EXTENDED=bool(residual), **chosen, **options(scheme, out, unit))
        if residual:
            parts = parts_of(tuple(residual), unit, x.device)
            of_parts = (x, basis, parts, values, scales, counters, m, x.stride(0), width)
            residual_kernel[(triton.cdiv(m, rows) * len(parts),)](*of_parts, **chosen, **options(scheme, out, unit))
    return QuantizedInput(values, scales, e_ref if out == "fp8" else 0)


def quantize_reference(
    x: Tensor, basis: Tensor | None, scheme: Scheme, out: Output, *, residual: Sequence[int] = (), e_ref: int = 0
) -> QuantizedInput:
    """The same in torch, from `ptq.scheme`. Same arguments, result and errors."""
    check_output(scheme, out)
    values = scheme.quantize_input(x, basis, residual)
    if out == "packed":
        changed = scheme.transform_input(x, basis)
        rest = columns(changed, residual) - columns(values[..., : changed.shape[-1]], residual)
        both = torch.cat((changed, rest), -1)
        return QuantizedInput(*scheme.format.pack(scheme.format.quantize(both, scale_rule=scheme.input_rule)))
    if out == "bf16":
        return QuantizedInput(values.to(torch.bfloat16), None)
    return QuantizedInput((values * 2.0**-e_ref).clamp(-57344.0, 57344.0).to(torch.float8_e5m2), None, e_ref)


def count_outside_reference(fmt: Format, packed: Tensor, scales: Tensor, e_ref: int = E_REF) -> tuple[int, int]:
    """The kernel's counters in torch: (saturated, underflowed) groups of packed codes outside the exact range of e5m2.

    Args:
        packed: uint8 [M, K/2]. scales: [M, K/group]. e_ref: reference exponent of the FP8 form.

    Raises:
        FormatError: values of these codes are not exact in FP8.
    """
    exponents = fmt.exponents(packed, scales)
    if exponents is None:
        raise FormatError(
            f"{fmt.title} codes whose scales have mantissas are not exact in FP8: there is nothing to count."
        )
    low, high = (exponent - e_ref for exponent in exponents)
    used = exponents[1] != -EMPTY
    return int((used & (high > E5M2_RANGE[1])).sum()), int((used & (low < E5M2_RANGE[0])).sum())


def check_output(scheme: Scheme, out: Output) -> None:
    """Raise FormatError where `scheme` has no exact `out`."""
    if out == "fp8" and not scheme.format.exact_in_fp8(scheme.input_rule):
        raise FormatError(f"{scheme.format.name} activations are not exact in FP8; ask for bf16 or packed.")


def significand_parts(dtype: torch.dtype, smooth: bool) -> int:
    """bfloat16 summands that hold x * smooth exactly (8 bits each; float32 has 24)."""
    bits = {torch.bfloat16: 8, torch.float16: 11}.get(dtype, 24) + (8 if smooth else 0)
    return min(3, -(-bits // 8))


def tile_of(scheme: Scheme, out: Output, unit: int) -> tuple[int, int]:
    """Elements of a tile of units, and warps of a program."""
    if unit > PANEL:
        return WIDE_TILE, WIDE_WARPS
    small = out == "packed" and (scheme.format.name, scheme.input_rule) == (HiF4.name, "mse")
    return (SMALL_TILE, SMALL_TILE_WARPS) if small else (TILE_ELEMENTS, WARPS)


def options(scheme: Scheme, out: Output, unit: int) -> dict[str, Any]:
    """Compiler options. Contraction is off: what is to be fused says so."""
    return {"num_warps": tile_of(scheme, out, unit)[1], "num_stages": 3, "enable_fp_fusion": False}


def constants(
    scheme: Scheme, out: Output, dtype: torch.dtype, k: int, e_ref: int, m: int, family: int
) -> dict[str, Any]:
    """Compile-time arguments of `quantize_kernel` for one scheme, row length, number of rows and capability family."""
    transform, unit = scheme.transform, scheme.unit(k)
    block = transform.block_of(k) if transform.kernel == "blocks" else 0
    rotation = transform.block_of(k) if isinstance(transform, Hadamard) else 0
    if block and family not in WHOLE:
        unit = min(unit, PANEL)
    rows = tile_of(scheme, out, unit)[0] // unit
    return {
        "K": k,
        "L": unit,
        "ROWS": rows,
        # A larger block is decoded for more rows.
        "STEPS": STEPS * max(1, block // PANEL) if m >= max(MANY_ROWS, rows) else 1,
        "FORMAT": scheme.format.kernel_id,
        "OUT": out,
        "ROTATION": rotation,
        "FACTOR": rotation_factors(rotation)[0] if rotation else 1.0,
        "BLOCK": block,
        "DEPTH": block if family in WHOLE else block // 2,
        "PARTS": significand_parts(dtype, transform.kernel == "hadamard" and transform.tensor is not None),
        "RULE": scheme.format.kernel_rule(str(scheme.input_rule)),
        "E_REF": e_ref,
    }


@triton.jit
def quantize_kernel(
    x_ptr,
    basis_ptr,
    values_ptr,
    scales_ptr,
    counters_ptr,
    M,
    stride_m,
    width,
    K: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT: tl.constexpr,
    ROTATION: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    RULE: tl.constexpr,
    E_REF: tl.constexpr,
    EXTENDED: tl.constexpr,
):
    """STEPS tiles of ROWS units; a unit is L consecutive elements of a row, and rows hold K / L units. Several steps need M >= ROWS.

    With learned blocks of BLOCK channels the units of a program lie in one column of units, whose columns of their block are
    decoded once, as operands of DEPTH rows; else they follow each other along rows. width: of a row of the output, which with EXTENDED goes on behind its K
    elements.
    """
    UNITS: tl.constexpr = K // L
    if BLOCK > 0:
        place = tl.program_id(0) % UNITS
        first = (tl.program_id(0) // UNITS) * (ROWS * STEPS)
        start = place * L // BLOCK * BLOCK
        block = b.load_block(basis_ptr + start * BLOCK + (place * L - start), BLOCK, DEPTH, L)
        below = tl.arange(0, ROWS).to(tl.int64)[:, None] * stride_m + (start + tl.arange(0, DEPTH)[None, :])
    else:
        first = tl.program_id(0) * (ROWS * STEPS)
    # The last tiles of a column are moved up until all their rows exist: nothing is masked, some rows are written twice, alike.
    SHIFTED: tl.constexpr = BLOCK > 0 and STEPS > 1 and counters_ptr is None
    for step in range(STEPS):
        top = first + step * ROWS
        if SHIFTED:
            top = tl.minimum(top, M - ROWS)
        index = top + tl.arange(0, ROWS)
        if BLOCK > 0:
            first_column = place * L
            row = index
            column = place * L + tl.arange(0, L)[None, :]
            at = x_ptr + top.to(tl.int64) * stride_m + below
        else:
            first_column = (index % UNITS) * L
            row = index // UNITS
            column = (index % UNITS)[:, None] * L + tl.arange(0, L)[None, :]
            at = x_ptr + row.to(tl.int64)[:, None] * stride_m + column
        inside = tl.full((ROWS,), True, tl.int1) if SHIFTED else row < M
        if BLOCK > 0:
            x = b.multiply_block(at, inside[:, None], block, BLOCK, DEPTH, PARTS)
        else:
            x = tl.load(at, mask=inside[:, None], other=0.0)
        if BLOCK == 0 and basis_ptr is not None:
            x = x.to(tl.float32) * tl.load(basis_ptr + column, mask=inside[:, None], other=0.0).to(tl.float32)
        if ROTATION > 0:
            x = b.rotate(x, ROTATION, FACTOR, PARTS)
        before = row.to(tl.int64) * (width if EXTENDED else K)
        f.store_tile(
            x.to(tl.float32), before + first_column, before[:, None] + column, inside, values_ptr, scales_ptr, counters_ptr,
            FORMAT, L, ROWS, OUT, RULE, E_REF,
        )  # fmt: skip
