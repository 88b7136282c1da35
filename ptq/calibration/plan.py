"""What `ptq calibrate` will take: prompts, records, disk, memory, time, before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptq.calibration.records import prompt_file
from ptq.calibration.run import CalibrationPlan
from ptq.sharding import Shard
from ptq.ui.progress import format_seconds
from ptq.wan.estimates import EFFICIENCY, call_size, forward_flops, measure_rate, sampling_memory
from ptq.wan.preflight import Needs, gigabytes

TEXT_BYTES_PER_TOKEN = 4096 * 4
"""Upper limit of a text embedding's row: UMT5-XXL in float32."""


@dataclass(frozen=True)
class CalibrationEstimate:
    """prompts: that this shard still has to record. seconds: upper limit; the run of a prompt ends with its last record."""

    prompts: int
    needs: Needs
    seconds: float | None


def estimate(
    plan: CalibrationPlan, out: Path, shard: Shard, device: str, offload: str, *, timed: bool
) -> CalibrationEstimate:
    """Estimate one process's part.

    Args:
        out: the calibration directory; prompts whose file is there count as done.
        timed: measure the device's speed (a fraction of a second) for an estimate of the time.
    """
    todo = [i for i in shard.select(range(len(plan.samples))) if not prompt_file(out, i).exists()]
    size, branches = call_size(plan.layout, plan.preset), len(plan.branches)
    float_bytes = 4 if device == "cpu" else 2
    channels, frames, height, width = size.latent
    record = channels * frames * height * width * float_bytes
    per_prompt = plan.steps_per_prompt * branches * record + size.text * TEXT_BYTES_PER_TOKEN
    memory = sampling_memory(plan.layout, plan.preset, device, offload, decode=False)
    needs = Needs(len(todo) * per_prompt, memory["ram"], memory["vram"]) if todo else Needs()
    seconds = None
    if timed:
        import torch

        rate = measure_rate(device, torch.float32 if device == "cpu" else torch.bfloat16)
        config = next(iter(plan.layout.experts.values()))
        calls = len(todo) * plan.preset.steps * branches
        seconds = calls * forward_flops(config, size) / (rate * EFFICIENCY)
    return CalibrationEstimate(len(todo), needs, seconds)


def describe_plan(plan: CalibrationPlan, out: Path, shard: Shard, device: str, offload: str) -> dict[str, str]:
    """Name -> value for --dry-run."""
    preset, size = plan.preset, call_size(plan.layout, plan.preset)
    found = estimate(plan, out, shard, device, offload, timed=True)
    records = len(plan.samples) * plan.steps_per_prompt * len(plan.branches)
    rows = {
        "model": f"{plan.layout.path} ({preset.variant})",
        "prompts": f"{len(plan.samples)} of {plan.prompts_file['name']}",
        "left for this process": f"{found.prompts} (shard {shard.index}/{shard.count})",
        "video": f"{preset.width}x{preset.height}, {preset.num_frames} frames, {preset.steps} steps",
        "records": f"{records} ({plan.steps_per_prompt} steps of each prompt, {' and '.join(plan.branches)})",
        "tokens of a call": f"{size.tokens}",
        "disk, estimated": gigabytes(found.needs.disk),
        "RAM, estimated": gigabytes(found.needs.ram),
    }
    if device != "cpu":
        rows["GPU memory, estimated"] = f"{gigabytes(found.needs.vram)} on {device}, --offload {offload}"
    rows["time, estimated"] = f"at most {format_seconds(found.seconds or 0)} on {device}"
    return rows
