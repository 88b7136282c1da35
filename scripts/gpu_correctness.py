"""What a GPU must get right before its speed is worth measuring: every kernel against its torch reference.

Works on the device it is given; the tests run it on small shapes under Triton's interpreter, `gpu_suite.py` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq import formats
from ptq.errors import UsageError
from ptq.runtime import QuantLinear, QuantSpec, backends, cpu, ops
from ptq.runtime.exactness import BF16_DECODED, Placement, place
from ptq.runtime.kernels.expand_weight import expand_weight, expand_weight_reference
from ptq.runtime.kernels.ffn_fused import ffn_up_quantized, ffn_up_quantized_reference
from ptq.runtime.kernels.gemm_fp8 import gemm_fp8
from ptq.runtime.kernels.gemm_packed import gemm_packed
from ptq.runtime.kernels.hadamard_quantize import hadamard_quantize, hadamard_quantize_reference
from ptq.scheme import encode_blocks

MXFP4, HIF4 = QuantSpec("mxfp4", 32, True), QuantSpec("hif4", 32, True)
LEARNED = QuantSpec("mxfp4", 64, scale_rule="even", learned=True), QuantSpec("hif4", 64, scale_rule="mse", learned=True)
FP8_LIMIT, FP8_ACCURATE_LIMIT, F32_LIMIT = 1.6e-3, 4e-4, 2e-6
"""Relative error of float32 results: fast FP8 accumulation (14 bits), promoted every 512, true float32."""
CODE_LIMIT = 1e-4
"""Share of codes that may differ where a float32 rotation sum rounds."""


@dataclass(frozen=True)
class Check:
    """One comparison: passes when value <= limit."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Case:
    """Rows, output features, input features."""

    m: int
    n: int
    k: int


def run(device: torch.device, cases: list[Case], rows: tuple[int, ...] = (1, 7, 63, 512)) -> Iterator[Check]:
    """Yield every check: kernels on each case, whole layers for each row count and backend."""
    for case in cases:
        x, smooth = _input(case, device)
        yield from _quantizer(case, x, smooth)
        yield from _products(case, x, smooth, device)
    yield from _layers(cases[0], rows, device)


def _input(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gaussian rows with a few channels 30 times larger, as activations have, and a smoothing vector."""
    generator = torch.Generator().manual_seed(case.k)
    x = torch.randn(case.m, case.k, generator=generator)
    x[:, :: max(1, case.k // 8)] *= 30
    smooth = torch.rand(case.k, generator=generator) + 0.5
    return x.to(device, torch.bfloat16), smooth.to(device, torch.bfloat16)


def _weight(case: Case, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    fmt = formats.get(name)
    w = torch.randn(case.n, case.k, generator=torch.Generator().manual_seed(case.n)) / case.k**0.5
    packed, scale = fmt.pack(fmt.quantize(w))
    return packed.to(device), scale.to(device)


def _blocks(k: int, device: torch.device) -> Tensor:
    """Random learned blocks of 64 with entries that are multiples of 1/8."""
    entries = torch.randint(-8, 9, (k // 64, 64, 64), generator=torch.Generator().manual_seed(k))
    entries[:, 0, 0] = 8
    return encode_blocks(entries.float()).to(device)


def _quantizer(case: Case, x: Tensor, smooth: Tensor) -> Iterator[Check]:
    blocks = _blocks(case.k, x.device)
    for spec in (MXFP4, HIF4, *LEARNED):
        basis = blocks if spec.learned else smooth
        for out in ("packed", "bf16", "fp8") if spec.format == "mxfp4" else ("packed", "bf16"):
            found = hadamard_quantize(x, basis, spec, out)
            expected = hadamard_quantize_reference(x, basis, spec, out)
            name = f"quantize {spec.format}{' learned' * spec.learned} {out} {case}"
            yield Check(name, _mismatch(found.values, expected.values), CODE_LIMIT)
    integers = (x.float() * 8).round().clamp(-127, 127).to(torch.bfloat16)  # every rotation sum is exact
    for spec in (QuantSpec("mxfp4", 32), QuantSpec("hif4", 64), *LEARNED):
        out, basis = "fp8" if spec.format == "mxfp4" else "bf16", blocks if spec.learned else None
        found = hadamard_quantize(integers, basis, spec, out).values
        expected = hadamard_quantize_reference(integers, basis, spec, out).values
        name = f"quantize {spec.format}{' learned' * spec.learned} {out}, exact sums {case}"
        yield Check(name, _mismatch(found, expected), 0.0)


def _products(case: Case, x: Tensor, smooth: Tensor, device: torch.device) -> Iterator[Check]:
    packed, scale = _weight(case, "mxfp4", device)
    placement = place(packed, scale)
    wide = Placement("e5m2", placement.exponent - 7, None, "")
    for one in (placement, wide, BF16_DECODED):
        found, expected = (f(packed, scale, "mxfp4", one) for f in (expand_weight, expand_weight_reference))
        yield Check(f"expand mxfp4 {one.kind} {case}", _mismatch(found, expected), 0.0)
    w = expand_weight(packed, scale, "mxfp4", placement)
    a = hadamard_quantize(x, smooth, MXFP4, "fp8").values
    exact = a.double() @ cpu.decode(packed, scale, "mxfp4").double().T
    for accurate, limit in ((False, FP8_LIMIT), (True, FP8_ACCURATE_LIMIT)):
        found = gemm_fp8(a, w, placement.exponent, None, None, torch.float32, accurate=accurate)
        yield Check(f"gemm_fp8 accurate={accurate} {case}", _relative(found, exact), limit)
    yield from _fused(case, a, w, placement)
    for name, spec in (("mxfp4", MXFP4), ("hif4", HIF4)):
        packed, scale = _weight(case, name, device)
        grid = hadamard_quantize(x[:64], smooth, spec, "bf16").values
        exact = grid.double() @ cpu.decode(packed, scale, name).double().T
        found = gemm_packed(grid, packed, scale, name, None, torch.float32)
        yield Check(f"gemm_packed {name} {case}", _relative(found, exact), F32_LIMIT)


def _fused(case: Case, a: Tensor, w: Tensor, placement: Placement) -> Iterator[Check]:
    arguments = (a, w, placement.exponent, None, None, None, QuantSpec("mxfp4", 32))
    found, expected = ffn_up_quantized(*arguments).values, ffn_up_quantized_reference(*arguments).values
    # FP8 accumulation moves some bfloat16 intermediates by one unit, and with them some codes: compare values.
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    yield Check(f"ffn_fused {case}", float(error), 3e-2)


def _layers(case: Case, rows: tuple[int, ...], device: torch.device) -> Iterator[Check]:
    """Every backend that can run here, through QuantLinear, against the float32 path on the CPU."""
    for spec in (MXFP4, HIF4, *LEARNED):
        packed, scale = _weight(case, spec.format, torch.device("cpu"))
        codes = formats.get(spec.format).unpack(packed, scale)
        basis = _blocks(case.k, packed.device) if spec.learned else _input(case, packed.device)[1]
        layer = QuantLinear.from_codes(codes, spec, torch.linspace(-1, 1, case.n), basis)
        for m in rows:
            x = _input(Case(m, case.n, case.k), torch.device("cpu"))[0]
            expected = cpu.linear(x.float(), packed, scale, layer.bias, basis, spec)
            for backend, found in _each_backend(layer, x, device):
                name = f"layer {spec.format}{' learned' * spec.learned} {backend} {m} rows"
                yield Check(name, _relative(found.cpu(), expected), 8e-3)


def _each_backend(layer: QuantLinear, x: Tensor, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    state = {name: tensor.to(device) for name, tensor in layer.state_dict().items()}
    tensors = (
        state["weight_packed"],
        state["weight_scale"],
        state["bias"],
        state["transform" if layer.spec.learned else "smooth"],
    )
    placement = ops.placement_of(*tensors[:2], layer.spec.format)
    shape = backends.Shape(x.shape[0], layer.out_features, layer.in_features)
    machine = backends.machine_of(device)
    for backend in backends.BACKENDS:
        try:
            backends.choose(layer.spec, shape, placement, machine, backend)
        except UsageError:
            continue
        yield backend, ops.execute(backend, x.to(device), *tensors, layer.spec, placement)


def compiled_layer(device: torch.device) -> Check:
    """A quantized layer inside torch.compile equals itself outside."""
    packed, scale = _weight(Case(128, 256, 256), "mxfp4", device)
    spec = QuantSpec("mxfp4", 32)
    layer = QuantLinear.from_codes(formats.get("mxfp4").unpack(packed, scale), spec, None, None)
    x = _input(Case(128, 256, 256), device)[0]
    function: Callable[[Tensor], Tensor] = lambda x: torch.relu(layer(x)) * 2  # noqa: E731
    with torch.no_grad():
        found = torch.compile(function, fullgraph=True)(x)
        return Check("torch.compile", _mismatch(found, function(x)), 0.0)


def _mismatch(found: Tensor, expected: Tensor) -> float:
    same = found.shape == expected.shape and found.dtype == expected.dtype
    return float((found.float() != expected.float()).float().mean()) if same else float("nan")


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
