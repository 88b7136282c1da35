"""What `ptq calibrate` will take: prompts, records, disk, memory, time, before anything is spent."""

from __future__ import annotations

import math
from pathlib import Path

from ptq.calibration.records import prompt_file
from ptq.calibration.run import CalibrationPlan
from ptq.store.sharding import Shard
from ptq.ui.progress import format_seconds
from ptq.wan.estimates import EFFICIENCY, call_size, forward_flops, measure_rate, sampling_memory
from ptq.wan.preflight import Needs, gigabytes

TEXT_BYTES_PER_TOKEN = 4096 * 4
"""Upper limit of a text embedding's row: UMT5-XXL in float32."""


def prompts_left(plan: CalibrationPlan, out: Path, shard: Shard) -> int:
    """Prompts of this shard without a record file in `out`."""
    return sum(not prompt_file(out, index).exists() for index in shard.select(range(len(plan.samples))))


def estimate_needs(plan: CalibrationPlan, out: Path, shard: Shard, device: str, offload: str) -> Needs:
    """Disk of this process's part (records have the dtype of the model), RAM and GPU memory."""
    size = call_size(plan.layout, plan.preset)
    record = math.prod(size.latent) * (4 if device == "cpu" else 2)
    per_prompt = plan.steps_per_prompt * len(plan.branches) * record + size.text * TEXT_BYTES_PER_TOKEN
    memory = sampling_memory(plan.layout, plan.preset, device, offload, decode=False)
    return Needs(prompts_left(plan, out, shard) * per_prompt, memory["ram"], memory["vram"])


def estimate_seconds(plan: CalibrationPlan, out: Path, shard: Shard, device: str) -> float:
    """Upper limit of the time of this process's part: a prompt's run ends with its last record. Measures the device."""
    import torch

    rate = measure_rate(device, torch.float32 if device == "cpu" else torch.bfloat16)
    config = next(iter(plan.layout.experts.values()))
    calls = prompts_left(plan, out, shard) * plan.preset.steps * len(plan.branches)
    return calls * forward_flops(config, call_size(plan.layout, plan.preset)) / (rate * EFFICIENCY)


def describe_plan(plan: CalibrationPlan, out: Path, shard: Shard, device: str, offload: str) -> dict[str, str]:
    """Name -> value for --dry-run."""
    preset, size = plan.preset, call_size(plan.layout, plan.preset)
    needs = estimate_needs(plan, out, shard, device, offload)
    records = len(plan.samples) * plan.steps_per_prompt * len(plan.branches)
    rows = {
        "model": f"{plan.layout.path} ({preset.variant})",
        "prompts": f"{len(plan.samples)} of {plan.prompts_file['name']}",
        "left for this process": f"{prompts_left(plan, out, shard)} prompts (shard {shard.index}/{shard.count})",
        "video": f"{preset.width}x{preset.height}, {preset.num_frames} frames, {preset.steps} steps",
        "records": f"{records} ({plan.steps_per_prompt} steps of each prompt, {' and '.join(plan.branches)})",
        "tokens of a call": f"{size.tokens}",
        "disk, estimated": gigabytes(needs.disk),
        "RAM, estimated": gigabytes(needs.ram),
    }
    if device != "cpu":
        rows["GPU memory, estimated"] = f"{gigabytes(needs.vram)} on {device}, --offload {offload}"
    rows["time, estimated"] = f"at most {format_seconds(estimate_seconds(plan, out, shard, device))} on {device}"
    return rows
