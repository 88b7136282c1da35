"""What `ptq quantize` will take: sizes, records, memory, disk, time, before anything is spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import torch

from ptq import formats
from ptq.calibration.records import CalibrationSet
from ptq.checkpoint.shards import ShardSet
from ptq.quantization.calls import spread
from ptq.quantization.coverage import measure_coverage, recorded_call
from ptq.quantization.run import check_inputs
from ptq.quantization.settings import QuantizeSettings
from ptq.store.files import files_below
from ptq.ui.progress import format_seconds
from ptq.wan.estimates import (
    EFFICIENCY,
    denoiser_activation_bytes,
    forward_flops,
    hessian_flops,
    measure_rate,
    solve_flops,
)
from ptq.wan.layout import ModelLayout
from ptq.wan.preflight import Needs, gigabytes

STREAM_BYTES = 4
"""Hidden states of both streams are counted in float32."""
SOLVER_COPIES = 3
"""Matrices of the widest input's size alive while it is solved: Hessian, its transform, the factor."""
WEIGHT_COPIES = 6
"""float32 copies of the largest Linear alive while it is solved: transformed, codes, both roundings, their errors. With them
the estimate is within 5 % of a measured block of A14B's width (docs/benchmarks.md)."""
LIBRARY_BYTES = 700 * 2**20
"""Python, torch, diffusers and transformers, loaded."""


def describe_plan(
    layout: ModelLayout, calibration: CalibrationSet, settings: QuantizeSettings, device: str, out: Path
) -> dict[str, str]:
    """Name -> value for --dry-run. Checks the inputs as the run would.

    Raises:
        PtqError: whatever would stop the run before its first block.
    """
    check_inputs(layout, calibration, settings)
    shards = {expert: ShardSet(layout.path / expert) for expert in layout.experts}
    coverage = measure_coverage(layout, shards, calibration, settings)
    plan = {"model": f"{layout.path} ({layout.preset.variant})", "format": formats.get(settings.format).name}
    for expert in layout.experts:
        records, recorded = _used_records(calibration, settings, expert), len(calibration.of_expert(expert))
        tokens = recorded_call(layout, calibration, expert).tokens
        plan[expert] = (
            f"{layout.num_blocks(expert)} blocks, {records} of {recorded} records of {tokens} tokens, hidden states {gigabytes(stream_bytes(layout, calibration, settings, expert))}"
        )
        if settings.recipe.needs_hessian:
            used = settings.recipe.records
            hessian = min(tokens, used.hessian_tokens or tokens)
            plan[f"{expert}, tokens"] = (
                f"{records * hessian} in each Hessian, {records * min(tokens, used.tokens_per_record)} in the searches"
            )
    needs = estimate_needs(layout, calibration, settings, device, out)
    plan["recipe"] = f"{settings.recipe_name}: {settings.recipe.description}"
    plan["experts before"] = gigabytes(coverage.original_bytes)
    plan["experts after"] = gigabytes(packed_bytes(layout, settings))
    plan["W4A4 share of Linear parameters"] = f"{coverage.parameter_share:.2%}"
    plan["disk while it runs, estimated"] = gigabytes(needs.disk)
    plan["RAM, estimated"] = gigabytes(needs.ram)
    if device != "cpu":
        plan["GPU memory, estimated"] = gigabytes(needs.vram)
    auto = ", without the search of --high-precision auto" if settings.auto_protect else ""
    seconds = estimate_seconds(layout, calibration, settings, device)
    plan["time, estimated"] = f"{format_seconds(seconds)} on {device}{auto}"
    return plan


def _used_records(calibration: CalibrationSet, settings: QuantizeSettings, expert: str) -> int:
    return len(spread(calibration.of_expert(expert), settings.recipe.record_limit))


def stream_bytes(layout: ModelLayout, calibration: CalibrationSet, settings: QuantizeSettings, expert: str) -> int:
    """Bytes of both streams of hidden states of an expert's records."""
    tokens = recorded_call(layout, calibration, expert).tokens
    records = _used_records(calibration, settings, expert)
    return 2 * STREAM_BYTES * layout.width(expert) * tokens * records


def packed_bytes(layout: ModelLayout, settings: QuantizeSettings) -> int:
    """Bytes of all experts after quantization."""
    bits = formats.get(settings.format).bits_per_value
    total = 0.0
    for expert in layout.experts:
        shapes = layout.linear_shapes(expert).values()
        blocks = layout.num_blocks(expert) - len(settings.high_precision.get(expert, ()))
        quantized = blocks * sum(n * k for n, k in shapes)
        basis = blocks * sum(settings.spec.basis_bytes(k) for _, k in shapes)
        entries = ShardSet(layout.path / expert).entries.values()
        itemsize = max(entry.torch_dtype.itemsize for entry in entries)
        total += sum(entry.nbytes for entry in entries) - quantized * itemsize + quantized * bits / 8 + basis
    return int(total)


def estimate_needs(
    layout: ModelLayout,
    calibration: CalibrationSet,
    settings: QuantizeSettings,
    device: str,
    out: Path,
    *,
    link: bool = False,
    max_memory: int | None = None,
) -> Needs:
    """Disk, RAM and GPU memory of a whole run; what an unfinished run has written already is not counted again.

    Disk: finished blocks and the final shards at the same time, the copied components, and the streams where they do not
    fit into `max_memory` (default: half of the RAM). Memory: the streams (in RAM, or paged from disk), one block, its
    statistics, one forward.
    """
    streams = max(stream_bytes(layout, calibration, settings, expert) for expert in layout.experts)
    in_ram = streams <= (psutil.virtual_memory().available // 2 if max_memory is None else max_memory)
    folders = [path for path in layout.path.iterdir() if path.name not in layout.experts]
    others = 0 if link else sum(_bytes_below(folder) for folder in folders)
    written = _bytes_below(out.with_name(out.name + ".partial"))
    disk = max(0, 2 * packed_bytes(layout, settings) + others + (0 if in_ram else streams) - written)
    work = max(_working_bytes(layout, calibration, settings, expert, device) for expert in layout.experts)
    ram = LIBRARY_BYTES + (streams if in_ram else 0)
    return Needs(disk, ram + work, 0) if device == "cpu" else Needs(disk, ram, work)


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in files_below(folder))


def _working_bytes(
    layout: ModelLayout, calibration: CalibrationSet, settings: QuantizeSettings, expert: str, device: str
) -> int:
    config = layout.experts[expert]
    float_bytes = 4 if device == "cpu" else 2
    sizes = [n * k for n, k in layout.linear_shapes(expert).values()]
    block = sum(sizes) * float_bytes + WEIGHT_COPIES * 4 * max(sizes)
    widths = [item.k for item in layout.block_inputs(expert).values()]
    hessians = (
        sum(4 * k * k for k in widths) + SOLVER_COPIES * 4 * max(widths) ** 2 if settings.recipe.needs_hessian else 0
    )
    return block + hessians + denoiser_activation_bytes(config, recorded_call(layout, calibration, expert), float_bytes)


def estimate_seconds(
    layout: ModelLayout, calibration: CalibrationSet, settings: QuantizeSettings, device: str
) -> float:
    """Time of a whole run: each record through each block twice (three times with propagated inputs), Hessians, solves."""
    rate = measure_rate(device, torch.float32 if device == "cpu" else torch.bfloat16)
    rate32 = rate if device == "cpu" else measure_rate(device, torch.float32)
    passes = 3 if settings.recipe.records.inputs == "propagated" else 2
    seconds = 0.0
    for expert, config in layout.experts.items():
        size, records = recorded_call(layout, calibration, expert), _used_records(calibration, settings, expert)
        seconds += passes * records * forward_flops(config, size) / (rate * EFFICIENCY)
        if settings.recipe.needs_hessian:
            limit = settings.recipe.records.hessian_tokens or size.tokens + size.text
            sampled = replace(
                size, tokens=min(size.tokens, limit), text=min(size.text, limit), image=min(size.image, limit)
            )
            seconds += records * hessian_flops(config, sampled) / (rate32 * EFFICIENCY)
        if settings.recipe.rounding == "gptq":
            seconds += solve_flops(config) / (rate32 * EFFICIENCY)
    return seconds
