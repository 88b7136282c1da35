"""What a GPU must get right before its speed is worth measuring: every kernel against its torch reference.

Works on the device it is given; the tests run it on small shapes under Triton's interpreter, `gpu_suite.py` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.runtime import PackedWeight, QuantLinear, backends, cpu, ops
from ptq.runtime.conversion import KernelConversion
from ptq.runtime.kernels.expand_weight import expand_weight, expand_weight_reference
from ptq.runtime.kernels.gemm_fp8 import gemm_fp8
from ptq.runtime.kernels.gemm_packed import gemm_packed
from ptq.runtime.kernels.quantize import Output, quantize, quantize_reference
from ptq.scheme import Format, Learned, Placement, Scheme, Smoothed, get_format
from ptq.scheme.learned import encode_blocks
from ptq.scheme.placement import DECODED
from ptq.solvers.conversion import DEFINITION
from ptq.solvers.gptq import round_block
from ptq.solvers.grid import grid_of
from ptq.solvers.triton_columns import round_block as round_columns

MXFP4, HIF4 = (Scheme.of(name, transform="smoothed", block=32) for name in ("mxfp4", "hif4"))
RECIPES = tuple(backends.recipe_schemes().values())
LEARNED = (*RECIPES, Scheme.of("hif4", transform="learned", block=64, input_rule="mse"))
"""What ships, in blocks of 128; and the search in the blocks of a K that 128 does not divide."""
FP8_LIMIT, F32_LIMIT = 1.6e-3, 2e-6
"""Relative error of float32 results: fast FP8 accumulation (14 bits) at K = 5120, growing with sqrt(K); true float32."""
CODE_LIMIT = 1e-4
"""Share of codes that may differ where a float32 rotation sum rounds, or where two candidates of a search tie."""
COLUMNS_LIMIT = 1e-3
"""Share of GPTQ's codes that may differ: every column's feedback is summed in float32, in an order of its own."""


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
        x = _input(case, device)[0]
        yield from _quantizer(case, x)
        yield from _products(case, x)
    yield from _solve(cases[0], device)
    yield from _layers(cases[0], rows, device)


def _input(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gaussian rows with a few channels 30 times larger, as activations have, and a smoothing vector."""
    generator = torch.Generator().manual_seed(case.k)
    x = torch.randn(case.m, case.k, generator=generator)
    x[:, :: max(1, case.k // 8)] *= 30
    smooth = torch.rand(case.k, generator=generator) + 0.5
    return x.to(device, torch.bfloat16), smooth.to(device, torch.bfloat16)


def _weight(case: Case, scheme: Scheme, device: torch.device, bias: Tensor | None = None) -> PackedWeight:
    w = torch.randn(case.n, case.k, generator=torch.Generator().manual_seed(case.n)) / case.k**0.5
    rule = "p2" if scheme.input_rule == "p2" else None
    codes, scales = scheme.format.quantize_and_pack(w, scale_rule=rule)
    return PackedWeight(codes.to(device), scales.to(device), bias, _basis(case, scheme, device), scheme)


def _basis(case: Case, scheme: Scheme, device: torch.device) -> Tensor | None:
    if isinstance(scheme.transform, Learned):
        return _blocks(case.k, scheme.transform.block_of(case.k), device)
    return _input(case, device)[1] if isinstance(scheme.transform, Smoothed) else None


def _blocks(k: int, size: int, device: torch.device) -> Tensor:
    """Random learned blocks with entries that are multiples of 1/8."""
    entries = torch.randint(-8, 9, (k // size, size, size), generator=torch.Generator().manual_seed(k))
    entries[:, 0, 0] = 8
    return encode_blocks(entries.float()).to(device)


def _quantizer(case: Case, x: Tensor) -> Iterator[Check]:
    for scheme in (MXFP4, HIF4, *LEARNED):
        basis = _basis(case, scheme, x.device)
        for out in ("packed", "bf16", "fp8") if scheme.format.exact_in_fp8(scheme.input_rule) else ("packed", "bf16"):
            found, expected = (f(x, basis, scheme, out) for f in (quantize, quantize_reference))
            yield Check(f"quantize {scheme.key} {out} {case}", _mismatch(found.values, expected.values), CODE_LIMIT)
    integers = (x.float() * 8).round().clamp(-127, 127).to(torch.bfloat16)  # every rotation sum is exact
    rotated = (Scheme.of(name, transform="hadamard", block=block) for name, block in (("mxfp4", 32), ("hif4", 64)))
    for scheme in (*rotated, *LEARNED):
        out, basis = _output(scheme), _basis(case, scheme, x.device)
        found, expected = (f(integers, basis, scheme, out).values for f in (quantize, quantize_reference))
        yield Check(f"quantize {scheme.key} {out}, exact sums {case}", _mismatch(found, expected), 0.0)


def _output(scheme: Scheme) -> Output:
    return "fp8" if scheme.format.exact_in_fp8(scheme.input_rule) else "bf16"


def _products(case: Case, x: Tensor) -> Iterator[Check]:
    weight = _weight(case, MXFP4, x.device)
    placement = MXFP4.format.place(weight.codes, weight.scales)
    wide = Placement("e5m2", placement.exponent - 7, None, "")
    for one in (placement, wide, DECODED):
        found, expected = (f(weight, one) for f in (expand_weight, expand_weight_reference))
        yield Check(f"expand mxfp4 {one.kind} {case}", _mismatch(found, expected), 0.0)
    w = expand_weight(weight, placement)
    a = quantize(x, weight.basis, MXFP4, "fp8").values
    exact = a.double() @ weight.decode().double().T
    found = gemm_fp8(a, w, placement.exponent, None, None, torch.float32)
    yield Check(f"gemm_fp8 {case}", _relative(found, exact), FP8_LIMIT * max(1.0, case.k / 5120) ** 0.5)
    for scheme in (MXFP4, HIF4):
        weight = _weight(case, scheme, x.device)
        grid = quantize(x[:64], weight.basis, scheme, "bf16").values
        exact = grid.double() @ weight.decode().double().T
        found = gemm_packed(grid, weight, torch.float32)
        yield Check(f"gemm_packed {scheme.format.name} {case}", _relative(found, exact), F32_LIMIT)


def _solve(case: Case, device: torch.device) -> Iterator[Check]:
    """What `ptq quantize` launches: conversions of inputs and weights, GPTQ's columns."""
    generator = torch.Generator().manual_seed(case.k)
    tokens = torch.randint(-127, 128, (case.m, case.k), generator=generator).float().to(device)
    w = torch.randn(case.n, case.k, generator=generator).to(device)
    kernels = KernelConversion()
    for scheme in RECIPES:
        basis = _basis(case, scheme, device)
        found, expected = (one.input(tokens, basis, scheme) for one in (kernels, DEFINITION))
        yield Check(f"solve {scheme.key}, inputs {case}", _mismatch(found, expected), 0.0)
        for rule in dict.fromkeys((scheme.format.scale_rules[0], scheme.input_rule)):
            codes, defined = (one.weight(w, scheme.format, rule) for one in (kernels, DEFINITION))
            different = max(_mismatch(codes.elements, defined.elements), _mismatch(codes.scales, defined.scales))
            yield Check(f"solve {scheme.format.name} {rule}, weight {case}", different, CODE_LIMIT)
    for name in ("mxfp4", "hif4"):
        yield Check(f"solve {name}, columns {case}", _columns(get_format(name), w), COLUMNS_LIMIT)


def _columns(fmt: Format, w_nk: Tensor) -> float:
    """Share of different codes of a block of GPTQ's columns, by the kernel and by the eager walk."""
    weight = w_nk.T[:128].contiguous()
    steps = fmt.steps(fmt.quantize(w_nk).scales).T[:128].contiguous()
    feedback = (torch.randn(len(weight), len(weight), generator=torch.Generator().manual_seed(0)) * 0.05).to(weight)
    grid = grid_of(fmt)
    assert grid is not None
    by_kernel = round_columns(weight.clone(), weight.clone(), steps.clone(), feedback, grid.to(w_nk.device))
    return _mismatch(by_kernel, round_block(weight.clone(), weight.clone(), steps.clone(), feedback, fmt))


def _layers(case: Case, rows: tuple[int, ...], device: torch.device) -> Iterator[Check]:
    """Every backend that can run here, through QuantLinear, against the float32 path on the CPU."""
    host = torch.device("cpu")
    for scheme in (MXFP4, HIF4, *LEARNED):
        weight = _weight(case, scheme, host, torch.linspace(-1, 1, case.n))
        for m in rows:
            x = _input(Case(m, case.n, case.k), host)[0]
            expected = cpu.linear(x.float(), weight)
            for backend, found in _each_backend(QuantLinear.from_packed(weight), x, device):
                yield Check(f"layer {scheme.key} {backend} {m} rows", _relative(found.cpu(), expected), 8e-3)


def _each_backend(layer: QuantLinear, x: Tensor, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    weight = layer.to(device).packed
    placement = ops.placement_of(weight)
    call = backends.Call(layer.scheme, x.shape[0], weight.n, weight.k, placement, backends.machine_of(device))
    for name, backend in backends.BACKENDS.items():
        if backends.obstacle(backend, call) is None:
            yield name, ops.execute(backend, x.to(device), weight, placement)


def compiled_layer(device: torch.device, backend: str = "inductor") -> Check:
    """A quantized layer inside torch.compile equals itself outside."""
    case = Case(128, 256, 256)
    layer = QuantLinear.from_packed(_weight(case, Scheme.of("mxfp4", transform="hadamard", block=32), device))
    x = _input(case, device)[0]
    function: Callable[[Tensor], Tensor] = lambda x: torch.relu(layer(x)) * 2  # noqa: E731
    with torch.no_grad():
        found = torch.compile(function, fullgraph=True, backend=backend)(x)
        return Check("torch.compile", _mismatch(found, function(x)), 0.0)


def _mismatch(found: Tensor, expected: Tensor) -> float:
    same = found.shape == expected.shape and found.dtype == expected.dtype
    if not same:
        return float("nan")
    if found.is_floating_point():  # FP8 has no comparison; scale words have more bits than float32
        found, expected = found.float(), expected.float()
    return float((found != expected).float().mean())


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
