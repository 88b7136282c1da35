"""Seconds and memory of what `ptq quantize` solves of one block; `gpu_suite.py` runs it.

Weights and tokens are random: what a solve does depends on shapes, not on values. Statistics are given, replay is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from gpu_measure import block_inputs
from torch import Tensor

from ptq.config import load_recipe
from ptq.quantization.placing import conversion_on
from ptq.scheme import Scheme
from ptq.solvers import InputStats, solve_group

SAMPLES = 1024
"""Tokens that errors are measured on."""


def solve_block(recipes: Sequence[tuple[str, str]], width: int, ffn: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each recipe and input, and one for the whole block: seconds, and the largest peak of GPU memory in bytes.

    Args:
        recipes: names, each with its format.
    """
    rows: list[dict[str, Any]] = []
    for name, format_name in recipes:
        recipe = load_recipe(name, format_name)
        scheme = Scheme.of(format_name, **recipe.scheme.model_dump())
        conversion = conversion_on(device, scheme)
        own: list[dict[str, Any]] = []
        for title, shapes in block_inputs(width, ffn).items():
            stats = _statistics(shapes[0][1], device)
            weights = {f"{i}": torch.randn(shape, device=device) / shape[1] ** 0.5 for i, shape in enumerate(shapes)}
            _settle(device)
            start = time.perf_counter()
            solve_group(weights, stats, scheme, recipe.solver, conversion)
            peak = _settle(device)
            own.append({"candidate": name, "input": title, "seconds": time.perf_counter() - start, "peak": peak})
        seconds, peak = sum(row["seconds"] for row in own), max(row["peak"] for row in own)
        rows += [*own, {"candidate": name, "input": "whole block", "seconds": seconds, "peak": peak}]
    return rows


def _statistics(k: int, device: torch.device) -> InputStats:
    x: Tensor = torch.randn(2 * SAMPLES, k, device=device)
    x[:, :: max(1, k // 8)] *= 30
    return InputStats(x.T @ x, x.abs().amax(0), len(x), len(x), x[:SAMPLES].clone())


def _settle(device: torch.device) -> int:
    """Wait for the device; the peak of its memory since the last time, 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
