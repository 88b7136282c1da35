"""What a quantize run will take, before anything is spent: memory, disk, and time from a probe of the real kernels.

Memory is that of the large things alive at the same time, in the phase of a block that holds most: its records run through it
while statistics are collected, or its widest input is solved.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from ptq import ui
from ptq.quantization.job import Job
from ptq.quantization.placing import Place, choose_place
from ptq.quantization.probe import Rates, probe
from ptq.quantization.residual import PROBES
from ptq.solvers.measure import SAMPLE_TOKENS, row_step
from ptq.solvers.scales import CHUNK_ELEMENTS_CUDA
from ptq.store.files import files_below
from ptq.store.lora import describe_loras
from ptq.wan.block import BLOCKS
from ptq.wan.estimates import LIBRARY_BYTES, forward_flops, hessian_flops, solve_flops
from ptq.wan.preflight import Needs
from ptq.wan.replay import CACHED_CONTEXT_BYTES

SOLVE_PHASES = ((4.0, 1.5), (3.0, 6.25))
"""(matrices K x K, values N x K) in float32 alive while an input is factorised and while its columns are rounded: counted from
the storages that are alive, the weight itself apart. Comparing both roundings takes less."""
TARGET_PHASE = (3.0, 7.5)
"""The same while it is found what the codes were rounded from."""
PLAIN_VALUES = 4.25
"""The values where there is no Hessian."""
EAGER_VALUES = 7.0
"""The values while a GPU decodes the codes of plain rounding, by the eager functions."""
SEARCH_BYTES = 80
"""Temporaries of the search of scales, a weight of its chunk."""
CODES_BYTES = 1.1
"""Unpacked codes and scales of a value, kept until the block is done."""
DECODED_VALUES = 1
"""Copies of a Linear while its codes are decoded, at the first call of the quantized block on a CPU."""


TUNING_VALUES = 7.0
"""float32 values a weight while a block is tuned: target, latent, its step, rounded value, gradient, two moments, and of the
largest Linears temporaries."""
TUNING_COPIES = (23.0, 5.5, 2.5)
"""Tensors of the size of a call's hidden states, of its feed-forward and of its modulation that are alive on the way back through a
block: counted from the storages that are."""
TUNING_FORWARDS = 3.0
"""A step of tuning in forwards of its records: there and back."""
TUNING_ROUNDINGS = 2.0
"""What a step does to each weight, in the time that a weight takes to be rounded to nearest and searched."""

OUTPUT_PRODUCTS = 3
"""Outputs of a Linear on sample tokens: original, rounded to nearest, as solved."""


def needs(job: Job) -> Needs:
    """Disk, RAM and GPU memory of the whole run; what an unfinished run has written already is not counted again.

    Disk: finished blocks and the final shards at the same time, the copied components, and the streams where they are there.
    """
    experts, options = job.layout.experts, job.options
    streams = max(map(job.stream_bytes, experts))
    place = streams_place(job, streams)
    folders = [path for path in job.layout.path.iterdir() if path.name not in experts]
    others = 0 if options.link else sum(map(_bytes_below, folders))
    written = _bytes_below(job.out.with_name(job.out.name + ".partial"))
    disk = max(0, 2 * job.packed_bytes() + others + (streams if place == "disk" else 0) - written)
    work = max(working_bytes(job, expert) for expert in experts)
    ram = LIBRARY_BYTES + (streams if place in ("memory", "pinned") else 0)
    if options.device == "cpu":
        return Needs(disk, ram + work, 0)
    return Needs(disk, ram, work + (streams if place == "gpu" else 0))


def streams_place(job: Job, need: int) -> Place:
    """Where streams of `need` bytes go, by the memory that is free now."""
    options, free = job.options, None
    if options.device != "cpu":
        work = max(working_bytes(job, expert) for expert in job.layout.experts)
        free = max(0, torch.cuda.mem_get_info(options.device)[0] - work) if torch.cuda.is_available() else 0
    return choose_place(options.streams, need, gpu=free, ram=options.stream_limit)


def working_bytes(job: Job, expert: str) -> int:
    """Peak of one block's work beside the streams, in the phase that holds most."""
    call, itemsize = job.call_size(expert), job.options.dtype.itemsize
    inputs, shapes = list(job.layout.block_inputs(expert).values()), job.layout.linear_shapes(expert).values()
    values, records = sum(n * k for n, k in shapes), job.used_records(expert)
    sample = job.settings.recipe.records.tokens_per_record
    samples = sum(4 * min(call.rows(i.rows), sample) * records * i.k for i in inputs)
    squares = [4 * i.k**2 if job.settings.needs_hessian else 0 for i in inputs]
    forward = _forward_bytes(job, expert)
    collecting = itemsize * values + sum(squares) + samples + forward
    solving, targets = 0.0, 4 if job.settings.recipe.solver.tune else 0
    for position, one in enumerate(inputs):  # each Hessian is gone once its Linears are solved
        solved = (CODES_BYTES + targets) * sum(len(i.linears) * i.n * i.k for i in inputs[:position])
        tokens = min(call.rows(one.rows), sample) * records
        alone = _solve_bytes(job, len(one.linears), one.n, one.k, tokens)
        solving = max(solving, itemsize * values + solved + sum(squares[position + 1 :]) + samples + alone)
    replaying = (CODES_BYTES + job.settings.scheme.format.bits_per_value / 8) * values + forward
    if job.options.device == "cpu":  # layers keep their weight decoded, and quantized inputs are float32
        largest = max(n * k for n, k in shapes)
        wide = 6 * job.together(expert) * call.tokens * int(job.layout.experts[expert]["ffn_dim"])
        replaying += 4 * values + max(wide, 4 * DECODED_VALUES * largest)
    probes = PROBES * itemsize * call.tokens * job.layout.width(expert) if job.settings.recipe.solver.residual else 0
    phases = [collecting, solving, replaying]
    if job.settings.recipe.solver.tune:
        phases.append((itemsize + CODES_BYTES + 4 * TUNING_VALUES) * values + _tuning_bytes(job, expert))
    return int(_outside_bytes(job, expert) + probes + max(phases))


def _solve_bytes(job: Job, linears: int, n: int, k: int, tokens: int) -> float:
    """What solving an input of some Linears N x K holds, its Hessian included and its sample tokens not."""
    rows = linears * n
    square, value, gpu = 4.0 * k**2, 4.0 * rows * k, job.options.device != "cpu"
    copy = value if job.options.dtype.itemsize < 4 else 0.0  # of the weight in float32
    outputs = 4.0 * min(tokens, SAMPLE_TOKENS) * (OUTPUT_PRODUCTS * linears * (n // row_step(n)) + 2 * k)
    peak = PLAIN_VALUES * value
    if job.settings.needs_hessian:
        phases = (*SOLVE_PHASES, TARGET_PHASE) if job.settings.recipe.solver.tune else SOLVE_PHASES
        peak = max(squares * square + values * value for squares, values in phases)
        chunk = min(rows * k, CHUNK_ELEMENTS_CUDA) if gpu else 0
        peak = max(peak, 3 * square + 1.25 * value + SEARCH_BYTES * chunk)
    return copy + max(peak, square + EAGER_VALUES * value if gpu else 0.0, outputs + 3.5 * value)


def _forward_bytes(job: Job, expert: str) -> float:
    """One call of a block: attention or feed-forward, whichever is larger; norms and gates are float32 whatever the dtype."""
    hidden, wide, modulation, kept = _call_bytes(job, expert, job.together(expert))
    attention, feed_forward = (8, 4) if job.options.dtype.itemsize == 4 else (11, 5)
    return max(attention * hidden, feed_forward * hidden + 2 * wide) + modulation + kept


def _tuning_bytes(job: Job, expert: str) -> float:
    """One call of a block, there and back."""
    together = min(job.together(expert), job.tuning_records(expert)[0])
    hidden, wide, modulation, kept = _call_bytes(job, expert, together)
    factor = 4 / job.options.dtype.itemsize  # quantized inputs, norms and gradients of most are float32
    copies = (count * size for count, size in zip(TUNING_COPIES, (hidden, wide, modulation), strict=True))
    return factor * sum(copies) + kept


def _call_bytes(job: Job, expert: str, together: int) -> tuple[float, float, float, float]:
    """Of so many records: hidden states, feed-forward and modulation; and the contexts that are kept of all records."""
    config, call, itemsize = job.layout.experts[expert], job.call_size(expert), job.options.dtype.itemsize
    tokens = together * call.tokens
    hidden, wide = itemsize * tokens * job.layout.width(expert), itemsize * tokens * int(config["ffn_dim"])
    modulation = 24.0 * job.layout.width(expert) * (call.tokens if job.layout.variant.expand_timesteps else 1)
    kept = min(CACHED_CONTEXT_BYTES, job.used_records(expert) * modulation)
    return hidden, wide, together * modulation, kept


def _outside_bytes(job: Job, expert: str) -> int:
    """The expert without its blocks: embedders and output."""
    entries = job.shards[expert].entries
    outside = (entry for name, entry in entries.items() if not name.startswith(f"{BLOCKS}."))
    return job.options.dtype.itemsize * sum(math.prod(entry.shape) for entry in outside)


def seconds(job: Job, rates: Rates | None = None) -> float:
    """Time of the whole run: each record through each block twice, Hessians, solves; rates are probed where not given."""
    total = 0.0
    for expert, config in job.layout.experts.items():
        rate = rates or probe(job, expert)
        size, records = job.call_size(expert), job.used_records(expert)
        forward, blocks = forward_flops(config, size) / rate.forward, int(config["num_layers"])
        calls = math.ceil(records / job.together(expert))
        passes = 2.0
        if job.settings.recipe.solver.residual:  # once more for the second pass, and some records for each input
            passes += 1.0 + min(PROBES, records) * len(job.layout.block_inputs(expert)) / records
        total += rate.start + passes * max(records * forward, calls * blocks * rate.shortest)
        if job.settings.needs_hessian:
            limit = job.settings.recipe.records.hessian_tokens or size.tokens + size.text + size.image
            limited = {name: min(getattr(size, name), limit) for name in ("tokens", "text", "image")}
            total += records * hessian_flops(config, replace(size, **limited)) / rate.hessian
        if job.settings.recipe.solver.rounding == "gptq":
            total += solve_flops(config) / rate.solve
        if tune := job.settings.recipe.solver.tune:
            tuned, held_out = job.tuning_records(expert)
            together = min(tuned, job.together(expert))
            total += (TUNING_FORWARDS * tune.steps * together + 2 * held_out) * forward
            total += TUNING_ROUNDINGS * tune.steps * blocks * _block_values(job, expert) / rate.values
        total += blocks * (_block_values(job, expert) / rate.values + _search_flops(job, expert) / rate.hessian)
    return total


def _block_values(job: Job, expert: str) -> int:
    return sum(n * k for n, k in job.layout.linear_shapes(expert).values())


def _search_flops(job: Job, expert: str) -> float:
    """Products of a block's search for bases and of its reported errors: sample tokens through each candidate, traces."""
    settings, call = job.settings, job.call_size(expert)
    total = 0.0
    for item in job.layout.block_inputs(expert).values():
        count = len(item.linears)
        rows, looked_at = count * item.n, count * (item.n // row_step(item.n))
        sample = min(call.rows(item.rows), settings.recipe.records.tokens_per_record) * job.used_records(expert)
        sample = min(sample, SAMPLE_TOKENS)
        candidates = 2 + len(settings.recipe.solver.smoothing) if settings.scheme.transform.needs_records else 0
        total += 2.0 * sample * item.k * looked_at * (candidates + 2 if candidates else OUTPUT_PRODUCTS)
        total += (
            (rows + looked_at) * float(item.k) ** 2 if settings.needs_hessian else 0.0
        )  # rounded to nearest, and the signal
    return total


def describe(job: Job) -> dict[str, str]:
    """Name -> value for --dry-run. Checks the inputs as the run would.

    Raises:
        PtqError: whatever would stop the run before its first block.
    """
    job.check()
    settings, coverage, need = job.settings, job.coverage(), needs(job)
    plan = {"model": f"{job.layout.path} ({job.layout.preset.variant})", "layers": settings.scheme.describe()}
    if job.loras:
        plan["merged LoRA"] = describe_loras(job.loras)
    for expert in job.layout.experts:
        records, recorded = job.used_records(expert), len(job.calibration.of_expert(expert))
        tokens, used, streams = job.call_size(expert).tokens, settings.recipe.records, job.stream_bytes(expert)
        plan[expert] = (
            f"{job.layout.num_blocks(expert)} blocks, {records} of {recorded} records of {tokens} tokens, hidden states {ui.format_bytes(streams)} ({streams_place(job, streams)})"
        )
        if settings.needs_hessian:
            hessian = min(tokens, used.hessian_tokens or tokens)
            plan[f"{expert}, tokens"] = (
                f"{records * hessian} in each Hessian, {records * min(tokens, used.tokens_per_record)} in the searches"
            )
    plan["recipe"] = f"{settings.recipe_name}: {settings.recipe.description}"
    plan["experts before"] = ui.format_bytes(coverage.original_bytes)
    plan["experts after"] = ui.format_bytes(job.packed_bytes())
    plan["bits a quantized weight"] = (
        f"{coverage.bits_per_quantized_value:g}, with what layers store of their basis {coverage.bits_with_basis:.2f}"
    )
    plan["W4A4 share of Linear parameters"] = f"{coverage.parameter_share:.2%}"
    if tune := settings.recipe.solver.tune:
        counts = {expert: job.tuning_records(expert) for expert in job.layout.experts}
        each = "; ".join(f"{expert} on {tuned} records, {held} held out" for expert, (tuned, held) in counts.items())
        plan["tuning"] = f"{tune.steps} steps a block, {each}"
    if settings.recipe.solver.residual:
        plan["residual blocks"] = (
            f"at most {settings.recipe.solver.residual:.1%} more products of each expert, N x K of its Linears"
        )
    plan["disk while it runs, estimated"] = ui.format_bytes(need.disk)
    plan["RAM, estimated"] = ui.format_bytes(need.ram)
    if job.options.device != "cpu":
        plan["GPU memory, estimated"] = ui.format_bytes(need.vram)
    auto = ", without the search of --high-precision auto" if settings.auto_protect else ""
    plan["time, estimated"] = f"{ui.format_seconds(seconds(job))} on {job.options.device}{auto}"
    return plan


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in files_below(folder))
