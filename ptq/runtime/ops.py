"""Quantized linear layers as one torch custom operator, so that torch.compile sees an opaque call with a known shape.

`ptq::linear` takes the tensors of a checkpoint and the scheme as a string, chooses a backend when it runs, and runs it. The
placement of a weight on the FP8 ladder is kept by tensor identity and forgotten with the tensor.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ptq.runtime import backends, cpu, gpu  # noqa: F401  (gpu registers its backends)
from ptq.runtime.cache import tensor_state
from ptq.runtime.weight import PackedWeight
from ptq.scheme import Placement, Scheme
from ptq.scheme.placement import DECODED


@torch.library.custom_op("ptq::linear", mutates_args=())
def linear_op(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    basis: Tensor | None,
    scheme: str,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype on the backend that `ptq.runtime.backends.choose` picks."""
    weight = PackedWeight(codes, scales, bias, basis, Scheme.from_key(scheme), residual)
    placement = DECODED if x.device.type == "cpu" else placement_of(weight)
    m, machine = x.numel() // x.shape[-1], backends.machine_of(x.device)
    call = backends.Call(weight.scheme, m, weight.n, weight.width, placement, machine)
    choice = backends.choose(call, backends.forced_backend())
    backends.report_once(weight.scheme.format.name, choice.backend.name, choice.reason)
    return execute(choice.backend, x, weight, placement)


@linear_op.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    basis: Tensor | None,
    scheme: str,
    residual: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [..., K] of any float dtype -> [..., N] in the same dtype.

    On the CPU, outside torch.compile, the operator's dispatch is skipped: it would cost more than a small layer.

    Raises:
        UsageError: a forced backend cannot run here.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and backends.forced_backend() in (None, "cpu"):
        backends.report_once(weight.scheme.format.name, cpu.CPU.name, cpu.CPU.merit)
        return cpu.linear(x, weight)
    return linear_op(x, weight.codes, weight.scales, weight.bias, weight.basis, weight.scheme.key, weight.residual)


def execute(backend: backends.Backend, x: Tensor, weight: PackedWeight, placement: Placement) -> Tensor:
    """Run one backend on x [..., K]; the result has x's dtype and leading shape."""
    if backend.device == "cpu":
        return backend.run(x, weight, placement)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.n)
    weight = dataclasses.replace(weight, codes=weight.codes.contiguous(), scales=weight.scales.contiguous())
    with torch.cuda.device_of(x):  # kernels launch on the current device, which need not be x's
        y = backend.run(x, weight, placement)
    return y.to(x.dtype).view(*x.shape[:-1], weight.n)


def placement_of(weight: PackedWeight) -> Placement:
    """The placement of a weight, computed at its first use and again when its codes are written to or moved."""
    state = (tensor_state(weight.codes), tensor_state(weight.scales), weight.scales.device)
    known = _placements.get(weight.scales)
    if known is None or known[0]() is not weight.codes or known[1] != state:
        known = (TensorWeakRef(weight.codes), state, weight.scheme.format.place(weight.codes, weight.scales))
        _placements[weight.scales] = known
    return known[2]


_placements: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
