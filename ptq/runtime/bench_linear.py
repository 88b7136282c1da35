"""Speed of quantized linear layers beside what a user would run instead, each with everything it does per call.

On a CPU: F.linear in float32 and bfloat16, fake quantization (decoded weight kept, input quantized), and ours. On a GPU
also FP8 W8A8 with dynamic scales and the plain block-scaled product. Candidates take turns in every round and the median
counts, so that load from elsewhere hits all of them alike: ratios mean more than rates.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq.runtime import cpu
from ptq.runtime.backends import recipe_schemes
from ptq.runtime.last_input import forget_input
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme

CPU_SHAPES = ((256, 192, 192), (256, 512, 192), (256, 192, 512), (1024, 1536, 1536))
"""[M, N, K] of small models, and one layer that no cache hides."""
GPU_SHAPES = ((32760, 5120, 5120), (32760, 13824, 5120), (32760, 5120, 13824), (512, 5120, 5120))
"""The block Linears of A14B at 832 x 480 x 81 frames: attention, feed-forward up and down, text keys and values."""
BASELINE = {"cpu": "float32", "cuda": "bf16"}
"""What speedups are relative to, by device."""

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Measurement:
    """One candidate on one shape [M, N, K].

    Attributes:
        seconds: median of a call, input quantization and weight expansion included.
        tflops: 2 M N K / seconds / 1e12.
        speedup: seconds of the baseline (float32 on a CPU, bf16 on a GPU) / seconds.
        weight_bytes: what the candidate keeps of the weight between calls (ours on a CPU: codes and decoded cache).
        error: largest difference to the float64 product of what was multiplied, relative to its largest value (None for
            candidates that quantize to another format).
    """

    shape: tuple[int, int, int]
    candidate: str
    seconds: float
    tflops: float
    speedup: float
    weight_bytes: int
    error: float | None


@dataclass(frozen=True)
class Benchmark:
    """All measurements of a run and where it ran."""

    device: str
    torch: str
    threads: int
    measurements: list[Measurement]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_linear(
    shapes: Sequence[tuple[int, int, int]],
    device: torch.device,
    repeats: int = 20,
    advance: Callable[[tuple[int, int, int]], None] = lambda shape: None,
) -> Benchmark:
    """Measure every candidate on every shape.

    Args:
        shapes: [M, N, K], K a multiple of 64.
        device: cpu or cuda.
        repeats: timed rounds after two warm-up rounds.
        advance: called after each shape.
    """
    measurements: list[Measurement] = []
    for shape in shapes:
        measurements += measure_shape(shape, device, repeats)
        advance(shape)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Benchmark(name, torch.__version__, torch.get_num_threads(), measurements)


def measure_shape(shape: tuple[int, int, int], device: torch.device, repeats: int) -> list[Measurement]:
    """One shape, all candidates."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(device)
    candidates = _candidates(x, weight)
    with torch.no_grad():
        seconds = median_seconds({name: run for name, (run, _, _) in candidates.items()}, device, repeats)
        baseline = seconds[BASELINE[device.type]]
        return [
            Measurement(
                shape=shape,
                candidate=name,
                seconds=seconds[name],
                tflops=2.0 * m * n * k / seconds[name] / 1e12,
                speedup=baseline / seconds[name],
                weight_bytes=nbytes,
                error=_error(run(), scheme, x, weight) if scheme else None,
            )
            for name, (run, nbytes, scheme) in candidates.items()
        ]


def median_seconds(runs: dict[str, Run], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each candidate, two warm-up rounds first.

    All take a turn in every round, each time in a shifted order: on a busy machine the scheduler's time slices would
    otherwise keep hitting the same candidate.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for round_index in range(repeats + 2):
        names = [*names[1:], names[0]]
        for name in names:
            elapsed = _timed(runs[name], device)
            if round_index >= 2:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(run: Run, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _candidates(x: Tensor, weight: Tensor) -> dict[str, tuple[Run, int, Scheme | None]]:
    """Name -> (call, bytes of weight kept, scheme if the result can be checked against its own fake quantization)."""
    found: dict[str, tuple[Run, int, Scheme | None]] = {}
    x16, w16 = x.bfloat16(), weight.bfloat16()
    if x.device.type == "cpu":
        found["float32"] = (lambda: F.linear(x, weight), weight.nbytes, None)
    found["bf16"] = (lambda: F.linear(x16, w16), w16.nbytes, None)
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 9):
        w8, factor = _to_e4m3(weight)
        found["fp8 w8a8"] = (lambda: _w8a8(x, w8, factor), w8.nbytes, None)
    for name, scheme in recipe_schemes().items():
        layer = quantized_layer(weight, scheme)
        decoded = layer.packed.decode().to(x.dtype)
        fake = _fake_quant(x, decoded, layer)
        packed = sum(p.nbytes for p in layer.parameters())
        cached = decoded.numel() * 4 if x.device.type == "cpu" else 0
        kept = packed + (cached if cached <= cpu.decoded_cache.limit_bytes else 0)
        found[f"{name} fake-quant"] = (fake, decoded.nbytes, scheme)
        if scheme.format.block_scaled and x.device.type == "cuda":
            found[f"{name} plain dot_scaled"] = (_plain_dot_scaled(x, layer), packed, scheme)
        found[f"{name} ptq"] = (_layer_call(layer, x), kept, scheme)
    return found


def quantized_layer(weight: Tensor, scheme: Scheme, bias: Tensor | None = None) -> QuantLinear:
    """Round a weight [N, K] to nearest, for speed measurements (no calibration)."""
    basis = scheme.transform.plain(weight.shape[1], weight.device)
    codes = scheme.format.quantize(scheme.transform.weight(weight, basis))
    return QuantLinear.from_codes(codes, scheme, bias, basis)


def _layer_call(layer: QuantLinear, x: Tensor) -> Run:
    def run() -> Tensor:
        forget_input()  # every call quantizes its input, as in a model where only q, k and v share one
        return layer(x)

    return run


def _fake_quant(x: Tensor, decoded: Tensor, layer: QuantLinear) -> Run:
    return lambda: F.linear(layer.scheme.quantize_input(x, layer.basis).to(x.dtype), decoded)


def _plain_dot_scaled(x: Tensor, layer: QuantLinear) -> Run:
    from ptq.runtime.kernels.gemm_dot_scaled import gemm_dot_scaled
    from ptq.runtime.kernels.quantize import quantize
    from ptq.runtime.kernels.tiles import Tile

    def run() -> Tensor:
        a = quantize(x, layer.basis, layer.scheme, "packed")
        weight = (layer.weight_packed, layer.weight_scale)
        return gemm_dot_scaled(a.values, a.scales, *weight, None, x.dtype, tile=Tile(128, 128, 128, stages=3))

    return run


def _to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    factor = (x.abs().amax().float() / 448.0).clamp(min=1e-12)
    return (x.float() / factor).to(torch.float8_e4m3fn), factor


@functools.cache
def _fused_to_e4m3() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_to_e4m3)  # a user of torchao or TransformerEngine has it as a kernel


def _w8a8(x: Tensor, w8: Tensor, w_factor: Tensor) -> Tensor:
    x8, x_factor = _fused_to_e4m3()(x)
    return torch._scaled_mm(x8, w8.t(), x_factor, w_factor, out_dtype=torch.bfloat16, use_fast_accum=True)


def _error(found: Tensor, scheme: Scheme, x: Tensor, weight: Tensor, rows: int = 64) -> float:
    """Relative difference to the float64 product of fake-quantized input and decoded weight, on the first rows."""
    layer = quantized_layer(weight, scheme)
    exact = scheme.quantize_input(x[:rows], layer.basis).double() @ layer.packed.decode().double().T
    return float((found[:rows].double() - exact).abs().max() / exact.abs().max())
