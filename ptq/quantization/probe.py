"""How fast this machine does what a quantize run consists of, from a few seconds of the real thing: one block of the model on
some tokens of a record, one panel of a Hessian, one panel of GPTQ's columns, some rows of the search of scales."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.quantization.collect import COLUMNS, add_product
from ptq.quantization.job import Job
from ptq.quantization.placing import solve_device
from ptq.scheme import Format
from ptq.solvers.factor import Factor
from ptq.solvers.gptq import gptq
from ptq.solvers.rtn import round_to_nearest
from ptq.solvers.scales import search_scales
from ptq.wan.estimates import CallSize, forward_flops
from ptq.wan.replay import BlockContext, run_block

TOKENS = 512
"""Of a record that run through the block, and of the Hessian's panel; all of a shorter one."""
ROWS = 256
"""Of a weight that are rounded."""
WIDTH = 1024
"""Columns of the panel of GPTQ, at most: longer ones reach the same rate."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of a forward, a Hessian and GPTQ; weights a second of everything else about a Linear; seconds of the
    shortest forward of a block, and of the start of an expert."""

    forward: float
    hessian: float
    solve: float
    values: float
    shortest: float
    start: float


def probe(job: Job, expert: str) -> Rates:
    """Measure an expert's rates on the job's device."""
    begin = time.perf_counter()
    replay = job.replay(expert)
    batch = job.calls(expert, replay).batches[0]
    hidden, context = replay.head("probe", *map(job.calibration.load, batch.records))
    block = replay.load_block(0)
    start = time.perf_counter() - begin
    size, config = job.call_size(expert), {**job.layout.experts[expert], "num_layers": 1}
    tokens = min(size.tokens, TOKENS)
    hidden, context = hidden[:, :tokens], _first(context, tokens)
    forward = _timed(lambda: run_block(block, hidden, context))
    size = CallSize(tokens, size.text, size.latent, size.image)
    _, k = max(job.layout.linear_shapes(expert).values(), key=lambda shape: shape[1])
    width = min(k, WIDTH)
    x = torch.randn(tokens, k, device=replay.device, dtype=replay.dtype)
    h_kk = torch.zeros(k, min(k, COLUMNS), device=replay.device)
    hessian = _timed(lambda: add_product(h_kk, x, x[:, : h_kk.shape[1]], 1.0))
    fmt, device = job.settings.scheme.format, solve_device(replay.device, float(k) ** 3)
    w_nk = torch.randn(ROWS, width, device=device)
    panel = _timed(lambda: _round(w_nk, fmt))
    values = _timed(lambda: _prepare(w_nk, fmt, searched=job.settings.recipe.solver.clip_search))
    return Rates(
        len(batch.records) * forward_flops(config, size) / forward,
        2.0 * tokens * h_kk.numel() / hessian,
        float(ROWS) * width**2 / panel,
        w_nk.numel() / values,
        forward,
        start,
    )


def _first(context: BlockContext, tokens: int) -> BlockContext:
    temb = context.temb[:, :tokens] if context.temb.dim() == 4 else context.temb
    return BlockContext(context.context, temb, tuple(table[:, :tokens] for table in context.rotary))


def _round(w_nk: Tensor, fmt: Format) -> Tensor:
    k = w_nk.shape[1]
    eye = torch.eye(k, device=w_nk.device)
    ones = eye.diagonal()
    factor = Factor(torch.arange(k, device=w_nk.device), eye, ones, 0.0 * ones, 0.0, 0, 0)
    return gptq(w_nk, factor, fmt, scales=round_to_nearest(w_nk, fmt).scales).codes.elements


def _prepare(w_nk: Tensor, fmt: Format, *, searched: bool) -> Tensor:
    """What is done with every weight beside GPTQ: rounding to nearest, scales, values."""
    codes = round_to_nearest(w_nk, fmt)
    return fmt.dequantize(codes) + (search_scales(w_nk, fmt)[:, :1] if searched else 0)


def _timed(run: Callable[[], Tensor]) -> float:
    """Seconds of the second call: the first one compiles and fills caches."""
    run()
    begin = time.perf_counter()
    run().flatten()[0].item()  # waits for the device
    return time.perf_counter() - begin
