"""From what a user asked for to a calibration: the plan, what it will take before anything is spent, and its start."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.calibration.directory import CalibrationDirectory
from ptq.calibration.run import CalibrationPlan, branches_of, calibrate
from ptq.errors import UsageError
from ptq.prompts import PromptSet, require_media
from ptq.store.embeddings import FOLDER as EMBEDDINGS
from ptq.store.lora import LoraInfo, describe_loras
from ptq.store.records import prompt_file
from ptq.store.run_directory import STATE_DIR
from ptq.store.sharding import Shard
from ptq.wan.encoding import TextEncoding, load_denoiser
from ptq.wan.estimates import (
    LOADING_RATE,
    LOADING_SECONDS,
    call_size,
    component_bytes,
    sampling_memory,
)
from ptq.wan.layout import ModelLayout
from ptq.wan.pipeline import place_pipeline
from ptq.wan.preflight import Needs, preflight

PROMPTS = 48
"""Prompts of a file that `ptq calibrate` takes unless the user says otherwise, or all where there are fewer: more gain little on
`tiny` (docs/quality.md)."""
RECORDS_PER_PROMPT = 8
"""Denoiser calls kept of each prompt unless the user says otherwise, both branches; fewer where the sampler makes fewer."""

TEXT_BYTES_PER_TOKEN = 4096 * 4
"""Upper limit of a text embedding's row: UMT5-XXL in float32."""


def make_plan(
    layout: ModelLayout,
    prompts: PromptSet,
    given: Mapping[str, Any] | None = None,
    *,
    records_per_prompt: int | None = None,
    seed: int = 0,
    skip_missing: bool = False,
    loras: Mapping[str, LoraInfo] | None = None,
) -> CalibrationPlan:
    """What to record: the prompts, with the preset's values where `given` has none of its own (None).

    Args:
        records_per_prompt: None is RECORDS_PER_PROMPT, or every call of a sampler that makes fewer.
        loras: expert -> LoRA that is merged into it before recording.
        skip_missing: with an image-to-video model, leave out prompts whose picture is not here.

    Raises:
        UsageError: a packed model, or a value that the model cannot have. PtqError: see `require_media`.
    """
    if layout.is_packed:
        raise UsageError(
            f"{layout.path} is a packed checkpoint, and `ptq quantize` takes no records of one. Record the original model that it was quantized from."
        )
    preset = layout.resolve_preset(**(given or {}))
    samples = require_media(prompts, skip_missing=skip_missing) if layout.needs_image else prompts.samples
    source = {"name": prompts.path.name, "sha256": prompts.sha256}
    if records_per_prompt is None:
        records_per_prompt = min(RECORDS_PER_PROMPT, preset.steps * len(branches_of(preset)))
    return CalibrationPlan(layout, preset, samples, records_per_prompt, seed, source, loras or {})


def record_plan(
    plan: CalibrationPlan,
    out: Path,
    *,
    shard: Shard | None = None,
    device: str = "cpu",
    offload: str = "none",
    fresh: bool = False,
    check: bool = False,
) -> dict[str, Any]:
    """Load the plan's model where something is left to record, and record it; `check` looks at the machine first.

    Returns:
        The content of calibration.json.

    Raises:
        PtqError: problems of the machine. Otherwise as `calibrate`.
    """
    shard = shard or Shard()
    check_out(plan, out, shard, fresh=fresh)  # said before the machine is looked at
    if check and (fresh or prompts_left(plan, out, shard)):
        needs = functools.partial(estimate_needs, plan, out, shard, device, offload)
        preflight(needs, out, device, state=out / STATE_DIR)

    dtype, preset = "float32" if device == "cpu" else "bfloat16", plan.preset
    negative = preset.negative_prompt if "uncond" in plan.branches else None
    folder = out / STATE_DIR / EMBEDDINGS
    encoding = TextEncoding(plan.layout, folder, dtype, preset.max_sequence_length, negative, device, offload)

    def load() -> Any:
        from ptq.wan.merge import merge_into

        pipeline = merge_into(load_denoiser(plan.layout, dtype), plan.layout, plan.loras)
        return place_pipeline(pipeline, device, offload)

    return calibrate(plan, load, out, shard=shard, fresh=fresh, encoding=encoding)


def check_out(plan: CalibrationPlan, out: Path, shard: Shard, *, fresh: bool) -> None:
    """Refuse a directory that the plan cannot be recorded into; see `RunDirectory.refuse_other`."""
    info = plan.info()
    CalibrationDirectory(out, info, shard, ()).refuse_other(info.decisive(), fresh=fresh)


def prompts_left(plan: CalibrationPlan, out: Path, shard: Shard) -> int:
    """Prompts of this shard without a record file in `out`."""
    return sum(not prompt_file(out, index).exists() for index in shard.select(range(len(plan.samples))))


def estimate_needs(plan: CalibrationPlan, out: Path, shard: Shard, device: str, offload: str) -> Needs:
    """Disk of this process's part (records have the dtype of the model), RAM and GPU memory."""
    size = call_size(plan.layout, plan.preset)
    record = math.prod(size.latent) * (4 if device == "cpu" else 2)
    per_prompt = plan.steps_per_prompt * len(plan.branches) * record + size.text * TEXT_BYTES_PER_TOKEN
    memory = sampling_memory(plan.layout, plan.preset, device, offload, decode=False)
    return Needs(prompts_left(plan, out, shard) * per_prompt, memory.ram, memory.vram)


def estimate_seconds(plan: CalibrationPlan, out: Path, shard: Shard, device: str) -> float:
    """Upper limit of the time of this process's part, loading included: a prompt's run ends with its last record. Times a block."""
    from ptq.wan.speed import call_seconds

    calls = prompts_left(plan, out, shard) * plan.preset.calls
    weights = sum(component_bytes(plan.layout.path, 4 if device == "cpu" else 2).values())
    loading = LOADING_SECONDS + weights / LOADING_RATE
    return loading + calls * call_seconds(plan.layout, call_size(plan.layout, plan.preset), device)


def describe_plan(plan: CalibrationPlan, out: Path, shard: Shard, device: str, offload: str) -> dict[str, str]:
    """Name -> value for --dry-run."""
    preset, size = plan.preset, call_size(plan.layout, plan.preset)
    needs = estimate_needs(plan, out, shard, device, offload)
    memory = sampling_memory(plan.layout, preset, device, offload, decode=False)
    rows = {
        "model": f"{plan.layout.path} ({preset.variant})",
        **({"merged LoRA": describe_loras(plan.loras)} if plan.loras else {}),
        "prompts": f"{len(plan.samples)} of {plan.prompts_file['name']}",
        "left for this process": f"{prompts_left(plan, out, shard)} prompts (shard {shard.index}/{shard.count})",
        "video": f"{preset.width}x{preset.height}, {preset.num_frames} frames, {preset.steps} steps",
        "records": f"{plan.record_count} ({plan.steps_per_prompt} steps of each prompt, {' and '.join(plan.branches)})",
        "tokens of a call": f"{size.tokens}",
        "disk, estimated": ui.format_bytes(needs.disk),
        "RAM, estimated": memory.describe() if device == "cpu" else ui.format_bytes(memory.ram),
    }
    if device != "cpu":
        rows[f"GPU memory, --offload {offload}"] = memory.describe()
    rows["time, estimated"] = f"at most {ui.format_seconds(estimate_seconds(plan, out, shard, device))} on {device}"
    return rows
