"""Throughput of quantize + pack and of fake-quant on real Wan shapes, beside a bfloat16 copy and other libraries.

Candidates take turns on the same tensor and the median counts, so that load from elsewhere hits all of them alike: the
ratios mean more than the rates. Two kinds of job are compared separately: packing (bfloat16 weight in, packed codes and
scales out) and fake-quant (bfloat16 in, bfloat16 out). Other libraries do the MXFP4 job with the floor rule.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ptq.scheme import FORMATS

WAN_SHAPES = ((5120, 5120), (13824, 5120), (5120, 13824), (3072, 3072), (14336, 3072), (3072, 14336))
"""[N, K] of the Linears of the A14B and 5B models."""
BLOCK = 32


@dataclass(frozen=True)
class Measurement:
    """Median rate of one candidate on one shape.

    Attributes:
        job: "copy", "pack" or "fake".
        megaelements_per_second: input elements a second / 1e6.
        over_torchao: rate / torchao's rate for packing MXFP4 in the same run; None where it is not installed.
    """

    shape: tuple[int, int]
    candidate: str
    job: str
    seconds: float
    megaelements_per_second: float
    over_torchao: float | None


@dataclass(frozen=True)
class Benchmark:
    """All measurements of a run and where it ran."""

    machine: dict[str, Any]
    not_installed: list[str]
    measurements: list[Measurement]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_quantize(
    shapes: Sequence[tuple[int, int]] = WAN_SHAPES,
    repeats: int = 5,
    advance: Callable[[tuple[int, int]], None] = lambda shape: None,
) -> Benchmark:
    """Measure every candidate on every shape.

    Args:
        shapes: weights [N, K].
        repeats: timed rounds after one warm-up round; each round runs every candidate once.
        advance: called after each shape.
    """
    candidates, missing = _candidates()
    measurements = []
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        measurements += _measure(x, candidates, repeats)
        advance(shape)
    return Benchmark(_machine(), missing, measurements)


def _measure(x: Tensor, candidates: dict[str, tuple[str, Callable[[Tensor], Any]]], repeats: int) -> list[Measurement]:
    for _, run in candidates.values():
        run(x)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, (_, run) in candidates.items():
            start = time.perf_counter()
            run(x)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: median(times) for name, times in seconds.items()}
    torchao = medians.get("torchao to_mx mxfp4")
    return [
        Measurement(
            shape=(x.shape[0], x.shape[1]),
            candidate=name,
            job=job,
            seconds=medians[name],
            megaelements_per_second=x.numel() / medians[name] / 1e6,
            over_torchao=torchao / medians[name] if torchao and job == "pack" else None,
        )
        for name, (job, _) in candidates.items()
    ]


def _candidates() -> tuple[dict[str, tuple[str, Callable[[Tensor], Any]]], list[str]]:
    found: dict[str, tuple[str, Callable[[Tensor], Any]]] = {"copy bfloat16": ("copy", torch.clone)}
    for name, format_ in FORMATS.items():
        found[f"ptq {name} pack"] = ("pack", format_.quantize_and_pack)
        found[f"ptq {name} fake-quant"] = ("fake", format_.fake_quantize)
    missing = []
    for label, package, load in (
        ("torchao to_mx mxfp4", "torchao", _torchao),
        ("compressed-tensors mxfp4", "compressed-tensors", _compressed_tensors),
    ):
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
            continue
        found[label] = ("pack", load())
    return found, missing


def _torchao() -> Callable[[Tensor], Any]:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # notes about GPU extensions that do not matter here
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    return lambda x: to_mx(x, torch.float4_e2m1fn_x2, BLOCK)


def _compressed_tensors() -> Callable[[Tensor], Any]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import MXFP4
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=MXFP4["weights"])
    compressor = BaseCompressor.get_value_from_registry(CompressionFormat.mxfp4_pack_quantized.value)

    def run(x: Tensor) -> Any:
        grouped = x.view(x.shape[0], -1, BLOCK)
        scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        return compressor.compress({"weight": x, "weight_scale": scale}, scheme)

    return run


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            return next((line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or platform.machine()
