"""The backends of CUDA devices: what each needs, and how it runs a layer from the kernels in `ptq/runtime/kernels/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq.runtime.backends import FEW_ROWS, Backend, Call, register_backend
from ptq.runtime.last_input import shared_input
from ptq.runtime.weight import PackedWeight
from ptq.scheme import Placement
from ptq.scheme.placement import DECODED, E_REF

if TYPE_CHECKING:
    from ptq.runtime.kernels.quantize import Output, QuantizedInput


def _no_kernels(call: Call) -> str | None:
    scheme = call.scheme
    if not call.machine.triton:
        return "triton is not installed (pip install triton)"
    if scheme.format.kernel_id is None:
        return f"{scheme.format.name} has no GPU kernels"
    if scheme.transform.kernel is None:
        return f"the transform {scheme.transform.kind} has no GPU kernel"
    return None


def _not_fp8(call: Call) -> str | None:
    if not call.scheme.format.exact_in_fp8(call.scheme.input_rule):
        return f"{call.scheme.format.name} scales have mantissas, exact in bfloat16 only"
    if call.placement.kind == "bf16":
        return f"the weight does not fit FP8 ({call.placement.reason})"
    return None


def _dot_scaled_obstacle(call: Call) -> str | None:
    reason = _no_kernels(call)
    if reason is None and not call.scheme.format.block_scaled:
        reason = f"{call.scheme.format.name} codes are no operands of block-scaled tensor cores"
    if reason is None and call.machine.capability[0] not in (10, 12):
        reason = f"block-scaled tensor cores came with Blackwell, found {call.machine.dotted}"
    return reason


def _triton_fp8_obstacle(call: Call) -> str | None:
    reason = _no_kernels(call) or _not_fp8(call)
    if reason is None and call.machine.capability[0] not in (9, 10, 12):
        reason = f"it needs tensor memory access (9.0 or later), found {call.machine.dotted}"
    return reason


def _scaled_mm_obstacle(call: Call) -> str | None:
    reason, placement = _no_kernels(call) or _not_fp8(call), call.placement
    if reason is None and placement.kind not in ("e4m3", "e4m3-row"):
        reason = f"torch._scaled_mm takes e4m3 weights, this one is {placement.kind} ({placement.reason})"
    if reason is None and call.machine.capability < (8, 9):
        reason = f"FP8 tensor cores came with 8.9, found {call.machine.dotted}"
    if reason is None and (call.n % 16 or call.k % 16):
        reason = f"torch._scaled_mm needs N and K to be multiples of 16, found {call.n} and {call.k}"
    return reason


def _bf16_decode_obstacle(call: Call) -> str | None:
    reason = _no_kernels(call)
    if reason is None and call.machine.capability < (8, 0):
        reason = f"it needs compute capability 8.0, found {call.machine.dotted}"
    return reason


def _dot_scaled(x: Tensor, w: PackedWeight, placement: Placement) -> Tensor:
    from ptq.runtime.kernels.gemm_dot_scaled import gemm_dot_scaled

    a = quantized_input(x, w, "packed")
    assert a.scales is not None
    w = w.widened()
    return gemm_dot_scaled(a.values, a.scales, w.codes, w.scales, w.bias, x.dtype)


def _triton_fp8(x: Tensor, w: PackedWeight, placement: Placement) -> Tensor:
    from ptq.runtime.kernels.expand_weight import expand_weight
    from ptq.runtime.kernels.gemm_fp8 import gemm_fp8

    a = quantized_input(x, w, "fp8")
    expanded, exponent = expand_weight(w, placement), placement.exponent + a.e_ref
    return gemm_fp8(a.values, expanded, exponent, placement.row_exponents, w.bias, x.dtype)


def _scaled_mm(x: Tensor, w: PackedWeight, placement: Placement) -> Tensor:
    from ptq.runtime.kernels.expand_weight import expand_weight

    a, expanded = quantized_input(x, w, "fp8"), expand_weight(w, placement)
    factors = [torch.full((), 2.0**exponent, device=x.device) for exponent in (a.e_ref, placement.exponent)]
    rows, bias, fuse = placement.row_exponents, w.bias, x.dtype == torch.bfloat16
    if bias is not None and fuse:  # in units of the rows: powers of two, exact
        bias = bias.to(x.dtype) if rows is None else torch.ldexp(bias.float(), -rows).to(x.dtype)
    # Without fast accumulation the sums are exact here: products are small multiples of one power of two.
    y = torch._scaled_mm(
        a.values,
        expanded.t(),
        *factors,
        bias=bias if fuse else None,
        out_dtype=x.dtype if fuse else torch.float32,
        use_fast_accum=False,
    )
    y = y if rows is None else y * torch.exp2(rows.to(y.dtype))
    return y if bias is None or fuse else y + bias.float()


def _bf16_decode(x: Tensor, w: PackedWeight, placement: Placement) -> Tensor:
    from ptq.runtime.kernels.expand_weight import expand_weight
    from ptq.runtime.kernels.gemm_packed import gemm_packed

    a = quantized_input(x, w, "bf16").values
    if a.shape[0] <= FEW_ROWS:
        return gemm_packed(a, w.widened(), x.dtype)
    expanded = expand_weight(w, DECODED)
    if x.dtype == torch.bfloat16:
        return F.linear(a, expanded, None if w.bias is None else w.bias.to(torch.bfloat16))
    y = torch.mm(a, expanded.t(), out_dtype=torch.float32)
    return y if w.bias is None else y + w.bias.float()


def quantized_input(x: Tensor, w: PackedWeight, out: Output) -> QuantizedInput:
    """x [..., K] quantized by the GPU kernel, [M, w.width]; shared by layers that read the same x with the same numerics."""
    from ptq.runtime.kernels.quantize import quantize

    blocks = w.blocks

    def run() -> QuantizedInput:
        return quantize(x.reshape(-1, x.shape[-1]), w.basis, w.scheme, out, residual=blocks, e_ref=E_REF)

    return shared_input(x, w.basis, (w.scheme, out, blocks), run)


for backend in (
    Backend(
        "dot-scaled",
        "cuda",
        "block-scaled tensor cores multiply the codes",
        _dot_scaled_obstacle,
        _dot_scaled,
        fast=True,
    ),
    Backend(
        "scaled-mm", "cuda", "values are exact in FP8, and so are the sums", _scaled_mm_obstacle, _scaled_mm, fast=True
    ),
    Backend("triton-fp8", "cuda", "every value is exact in FP8", _triton_fp8_obstacle, _triton_fp8, fast=True),
    Backend("bf16-decode", "cuda", "exact in bfloat16", _bf16_decode_obstacle, _bf16_decode, few_rows=True),
):
    register_backend(backend)
