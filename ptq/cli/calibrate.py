"""`ptq calibrate`: record what the denoiser is called with on calibration prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import default_device, describe_out, quiet_libraries, resolve_shard


def calibrate(
    model: options.Model,
    prompts: Annotated[Path, options.PROMPTS],
    out: Annotated[Path, options.OUT],
    num_prompts: Annotated[
        int | None, typer.Option("--num-prompts", min=1, help="Use the first N prompts. Default: 48, or all.")
    ] = None,
    steps: options.Steps = None,
    records_per_prompt: Annotated[
        int | None,
        typer.Option(
            "--records-per-prompt", min=1, help="Denoiser calls kept of each prompt, both branches. Default: 8, or all."
        ),
    ] = None,
    preset: options.Preset = None,
    lora: options.Lora = None,
    lora_2: options.Lora2 = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    flow_shift: options.FlowShift = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_scale_2: options.GuidanceScale2 = None,
    negative_prompt: options.NegativePrompt = None,
    media_root: options.MediaRoot = None,
    exclude: options.Exclude = None,
    prompt_format: options.PromptFormat = None,
    skip_missing: options.SkipMissing = False,
    seed: options.SampleSeed = 0,
    shard: options.Shard = None,
    device: options.Device = None,
    offload: options.Offload = "none",
    fresh: options.Fresh = False,
    check: options.Preflight = True,
    dry_run: options.DryRun = False,
) -> None:
    """Run the original model on calibration prompts and record denoiser inputs. Resumes where it stopped.

    Example: ptq calibrate tiny --prompts prompts.txt --num-prompts 8 --out calibration
    """
    from ptq.calibration.prepare import PROMPTS, check_out, describe_plan, make_plan, record_plan
    from ptq.prompts import read_prompts
    from ptq.wan.loading import find_model
    from ptq.wan.lora import choose_loras
    from ptq.wan.pipeline import check_offload

    check_offload(device, offload)
    part = resolve_shard(shard, out)
    given = {
        "named": preset,
        "steps": steps,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "flow_shift": flow_shift,
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "negative_prompt": negative_prompt,
    }
    layout = find_model(model)
    found = read_prompts(
        prompts,
        prompt_format=prompt_format,
        limit=num_prompts or PROMPTS,
        exclude=exclude,
        media_root=media_root or (),
        skip_missing=skip_missing and layout.needs_image,
    )
    plan = make_plan(
        layout,
        found,
        given,
        records_per_prompt=records_per_prompt,
        seed=seed,
        skip_missing=skip_missing,
        loras=choose_loras(layout, lora, lora_2),
    )
    check_out(plan, out, part, fresh=fresh)
    ui.info(f"{'Planning to record' if dry_run else 'Recording'} {model} on {len(plan.samples)} prompts of {prompts}.")

    from ptq.wan.check import check_model

    quiet_libraries()
    check_model(layout)
    device = device or default_device()
    check_offload(device, offload)
    if dry_run:
        rows = describe_plan(plan, out, part, device, offload)
        ui.details("Calibration plan", {**rows, "directory": describe_out(out, out, fresh=fresh)})
        return
    result = record_plan(plan, out, shard=part, device=device, offload=offload, fresh=fresh, check=check)
    if result["complete"]:
        ui.info(
            f"{plan.record_count} records of {len(plan.samples)} prompts in {out}. Next: ptq quantize {model} --calibration {out} ..."
        )
    else:
        ui.info(f"This shard is done; records of other shards are still missing in {out}.")
