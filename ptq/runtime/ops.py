"""Quantized linear layers as one torch custom operator, so that torch.compile sees an opaque call with a known shape.

`ptq::linear` takes the tensors of a checkpoint and the numerics, chooses a backend when it runs, and runs it. The
placement of a weight on the FP8 ladder is kept by tensor identity and forgotten with the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ptq.runtime import backends, cpu
from ptq.runtime.cache import tensor_state
from ptq.runtime.exactness import BF16_DECODED, E_REF, Placement, place
from ptq.runtime.sharing import shared_input
from ptq.runtime.spec import QuantSpec

if TYPE_CHECKING:
    from ptq.runtime.kernels.hadamard_quantize import Output, QuantizedInput

ACCURATE_VARIABLE = "PTQ_FP8_ACCURATE"
"""Set to 1: FP8 products promote their accumulator every 512 elements of K."""


@torch.library.custom_op("ptq::linear", mutates_args=())
def linear_op(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    basis: Tensor | None,
    format_name: str,
    rotation: int,
    scale_rule: str | None,
    ties: str | None,
    learned: bool,
) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype on the backend that `ptq.runtime.backends.choose` picks."""
    spec = QuantSpec(format_name, rotation, basis is not None and not learned, scale_rule, ties, learned)
    shape = backends.Shape(x.numel() // x.shape[-1], weight_packed.shape[0], x.shape[-1])
    placement = BF16_DECODED if x.device.type == "cpu" else placement_of(weight_packed, weight_scale, format_name)
    choice = backends.choose(spec, shape, placement, backends.machine_of(x.device), backends.forced_backend())
    backends.report_once(format_name, choice)
    return execute(choice.backend, x, weight_packed, weight_scale, bias, basis, spec, placement)


@linear_op.register_fake
def _(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    basis: Tensor | None,
    format_name: str,
    rotation: int,
    scale_rule: str | None,
    ties: str | None,
    learned: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_packed.shape[0])


def linear(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, basis: Tensor | None, spec: QuantSpec
) -> Tensor:
    """x [..., K] of any float dtype -> [..., N] in the same dtype: `ptq::linear` with a QuantSpec.

    On the CPU, outside torch.compile, the operator's dispatch is skipped: it would cost more than a small layer.

    Raises:
        UsageError: a forced backend cannot run here.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and backends.forced_backend() in (None, "cpu"):
        backends.report_once(spec.format, backends.ON_CPU)
        return cpu.linear(x, weight_packed, weight_scale, bias, basis, spec)
    numerics = (spec.format, spec.rotation, spec.scale_rule, spec.ties, spec.learned)
    return linear_op(x, weight_packed, weight_scale, bias, basis, *numerics)


def execute(
    backend: str,
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    basis: Tensor | None,
    spec: QuantSpec,
    placement: Placement,
) -> Tensor:
    """Run one backend (as named by `choose`) on x [..., K]; the result has x's dtype and leading shape."""
    if backend == "cpu":
        return cpu.linear(x, weight_packed, weight_scale, bias, basis, spec)
    n = weight_packed.shape[0]
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], n)
    weight_packed, weight_scale = weight_packed.contiguous(), weight_scale.contiguous()
    with torch.cuda.device_of(x):  # kernels launch on the current device, which need not be x's
        y = RUNNERS[backend](x, weight_packed, weight_scale, bias, basis, spec, placement)
    return y.to(x.dtype).view(*x.shape[:-1], n)


def _triton_fp8(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, basis: Tensor | None, spec: QuantSpec, p: Placement
) -> Tensor:
    from ptq.runtime.kernels.expand_weight import expand_weight
    from ptq.runtime.kernels.gemm_fp8 import gemm_fp8

    a = quantized_input(x, basis, spec, "fp8")
    w = expand_weight(packed, scale, spec.format, p)
    return gemm_fp8(a.values, w, p.exponent + a.e_ref, p.row_exponents, bias, x.dtype, accurate=_accurate())


def _scaled_mm(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, basis: Tensor | None, spec: QuantSpec, p: Placement
) -> Tensor:
    from ptq.runtime.kernels.expand_weight import expand_weight

    a = quantized_input(x, basis, spec, "fp8")
    w = expand_weight(packed, scale, spec.format, p)
    factors = [torch.full((), 2.0**exponent, device=x.device) for exponent in (a.e_ref, p.exponent)]
    fused = bias.to(x.dtype) if bias is not None and x.dtype == torch.bfloat16 else None
    y = torch._scaled_mm(a.values, w.t(), *factors, bias=fused, out_dtype=x.dtype, use_fast_accum=not _accurate())
    return y if bias is None or fused is not None else y + bias


def _dot_scaled(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, basis: Tensor | None, spec: QuantSpec, p: Placement
) -> Tensor:
    from ptq.runtime.kernels.gemm_dot_scaled import gemm_dot_scaled

    a = quantized_input(x, basis, spec, "packed")
    assert a.scales is not None
    return gemm_dot_scaled(a.values, a.scales, packed, scale, bias, x.dtype)


def _bf16_decode(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, basis: Tensor | None, spec: QuantSpec, p: Placement
) -> Tensor:
    from ptq.runtime.kernels.expand_weight import expand_weight
    from ptq.runtime.kernels.gemm_packed import gemm_packed

    a = quantized_input(x, basis, spec, "bf16").values
    if a.shape[0] <= backends.FEW_ROWS:
        return gemm_packed(a, packed, scale, spec.format, bias, x.dtype)
    w = expand_weight(packed, scale, spec.format, BF16_DECODED)
    if x.dtype == torch.bfloat16:
        return F.linear(a, w, None if bias is None else bias.to(torch.bfloat16))
    y = torch.mm(a, w.t(), out_dtype=torch.float32)
    return y if bias is None else y + bias.float()


RUNNERS: dict[str, Callable[..., Tensor]] = {
    "triton-fp8": _triton_fp8,
    "scaled-mm": _scaled_mm,
    "dot-scaled": _dot_scaled,
    "bf16-decode": _bf16_decode,
}


def placement_of(weight_packed: Tensor, weight_scale: Tensor, format_name: str) -> Placement:
    """The placement of a weight, computed at its first use and again when its codes are written to or moved."""
    if format_name != "mxfp4":
        return BF16_DECODED
    state = (tensor_state(weight_packed), tensor_state(weight_scale), weight_scale.device)
    known = _placements.get(weight_scale)
    if known is None or known[0]() is not weight_packed or known[1] != state:
        known = (TensorWeakRef(weight_packed), state, place(weight_packed, weight_scale))
        _placements[weight_scale] = known
    return known[2]


def quantized_input(x: Tensor, basis: Tensor | None, spec: QuantSpec, out: Output) -> QuantizedInput:
    """x [..., K] quantized by the GPU kernel, [M, K]; shared by layers that read the same x with the same numerics."""
    from ptq.runtime.kernels.hadamard_quantize import hadamard_quantize

    def quantize() -> QuantizedInput:
        return hadamard_quantize(x.reshape(-1, x.shape[-1]), basis, spec, out, e_ref=E_REF)

    return shared_input(x, basis, (spec, out), quantize)


_placements: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _accurate() -> bool:
    return os.environ.get(ACCURATE_VARIABLE, "0") == "1"
