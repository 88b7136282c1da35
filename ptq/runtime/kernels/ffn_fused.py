"""The up projection of a feed-forward network with the next layer's input quantization as its epilogue.

Unfused, the down projection's quantizer reads back what the up projection wrote: M x 13824 bfloat16 twice through
memory. Fused, the tile goes from the accumulator through bias, GELU (tanh form, as Wan uses it), smoothing, Hadamard
and MXFP4 rounding to FP8, and half as many bytes are written once. Intermediate results are rounded to bfloat16 where
the unfused layers would round, so that both give the same codes wherever their accumulators agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq.runtime.kernels import blocks as b
from ptq.runtime.kernels import hadamard_quantize as quantize
from ptq.runtime.kernels.gemm_fp8 import epilogue, gemm_fp8_reference, product_tile, tile_origin
from ptq.runtime.kernels.tiles import Tile, multiprocessors, tile_for
from ptq.runtime.spec import QuantSpec
from ptq.scheme import FormatError


def ffn_up_quantized(
    a: Tensor,
    w: Tensor,
    exponent: int,
    row_exponents: Tensor | None,
    bias: Tensor | None,
    next_smooth: Tensor | None,
    next_spec: QuantSpec,
    *,
    e_ref: int = 0,
    tile: Tile | None = None,
) -> quantize.QuantizedInput:
    """hadamard_quantize(gelu(gemm_fp8(a, w) + bias), out="fp8") without the intermediate tensor.

    Args:
        a, w, exponent, row_exponents, bias: as for `gemm_fp8`; N must be a multiple of the next layer's unit.
        next_smooth, next_spec: smoothing vector bfloat16 [N] or None, and numerics of the layer that follows.
        e_ref: reference exponent of the FP8 output. tile: overrides the table.

    Raises:
        FormatError: `next_spec` is not MXFP4, or has a learned transform (its blocks do not fit beside the tile).
    """
    quantize.check_output(next_spec, "fp8")
    if next_spec.learned:
        raise FormatError("The fused feed-forward rotates with Hadamard blocks only; quantize its output on its own.")
    (m, k), n = a.shape, w.shape[0]
    values = torch.empty((m, n), dtype=torch.float8_e5m2, device=a.device)
    if m:
        tile = tile or tile_for("ffn_fused", a.device, m, n, k)
        a_desc = TensorDescriptor.from_tensor(a, [tile.m, tile.k])
        w_desc = TensorDescriptor.from_tensor(w, [tile.n, tile.k])
        programs = min(multiprocessors(a.device), triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n))
        arguments = (a_desc, w_desc, values, bias, row_exponents, next_smooth, 2.0**exponent, m, n)
        fixed = constants(tile, k, n, next_spec, next_smooth is not None, e_ref)
        ffn_fused_kernel[(programs,)](*arguments, **fixed, **tile.options)
    return quantize.QuantizedInput(values, None, e_ref)


def ffn_up_quantized_reference(
    a: Tensor,
    w: Tensor,
    exponent: int,
    row_exponents: Tensor | None,
    bias: Tensor | None,
    next_smooth: Tensor | None,
    next_spec: QuantSpec,
    *,
    e_ref: int = 0,
) -> quantize.QuantizedInput:
    """The same, layer after layer in torch."""
    y = gemm_fp8_reference(a, w, exponent, row_exponents, bias, torch.bfloat16)
    activated = torch.nn.functional.gelu(y.float(), approximate="tanh").to(torch.bfloat16)
    return quantize.hadamard_quantize_reference(activated, next_smooth, next_spec, "fp8", e_ref=e_ref)


def constants(tile: Tile, k: int, n: int, spec: QuantSpec, smooth: bool, e_ref: int) -> dict[str, object]:
    """Compile-time arguments of `ffn_fused_kernel`: those of the quantizer for rows of N, and the tile."""
    fixed = quantize.constants(spec, "fp8", torch.bfloat16, smooth, n, e_ref)
    shared = ("ROTATION", "FACTOR", "PARTS", "CARRY", "MSE", "AWAY", "E_REF")
    tiling = {"K": k, "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group}
    return {name: fixed[name] for name in shared} | tiling


@triton.jit
def ffn_fused_kernel(
    a_desc,
    w_desc,
    values_ptr,
    bias_ptr,
    row_exponents_ptr,
    smooth_ptr,
    factor,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATION: tl.constexpr,
    FACTOR: tl.constexpr,
    PARTS: tl.constexpr,
    CARRY: tl.constexpr,
    MSE: tl.constexpr,
    AWAY: tl.constexpr,
    E_REF: tl.constexpr,
):
    """`gemm_fp8_kernel` with another epilogue; BN is a multiple of rotation block and group."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        start_m, start_n = tile_origin(tile, tiles_m, tiles_n, BM, BN, GROUP)
        total = product_tile(a_desc, w_desc, start_m, start_n, K, K, BM, BN, BK)
        row = start_m + tl.arange(0, BM)
        column = start_n + tl.arange(0, BN)
        y = epilogue(total * factor, column, N, bias_ptr, row_exponents_ptr)
        y = b.to_bf16(gelu_tanh(b.to_bf16(y).to(tl.float32))).to(tl.float32)
        if smooth_ptr is not None:
            y = y * tl.load(smooth_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if ROTATION > 0:
            y = b.rotate(y, ROTATION, FACTOR, PARTS)
        groups = tl.reshape(y, (BM * BN // 32, 32))
        byte = b.mxfp4_scales(groups, CARRY, MSE, AWAY)
        value = b.mxfp4_scaled(b.mxfp4_values(groups, byte, AWAY), byte, E_REF)
        offset = row.to(tl.int64)[:, None] * N + column[None, :]
        inside = (row < M)[:, None] & (column < N)[None, :]
        tl.store(values_ptr + offset, b.to_e5m2(tl.reshape(value, (BM, BN))), mask=inside)


@triton.jit
def gelu_tanh(x):
    """x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): GELU in its tanh form, float32."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))
