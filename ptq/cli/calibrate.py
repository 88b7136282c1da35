"""`ptq calibrate`: record what the denoiser is called with on calibration prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ptq.wan.layout import ModelLayout


def calibrate(
    model: Annotated[str, typer.Argument(help="`tiny`, a diffusers directory, or a hub id.", show_default=False)],
    prompts: Annotated[Path, typer.Option("--prompts", help="Prompt file: OpenS2V JSON, VBench, JSONL or .txt.")],
    out: Annotated[Path, typer.Option("--out", help="Calibration directory to write.")],
    num_prompts: Annotated[int | None, typer.Option("--num-prompts", min=1, help="Use the first N prompts.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Sampling steps.")] = None,
    records_per_prompt: Annotated[
        int, typer.Option("--records-per-prompt", min=1, help="Denoiser calls kept of each prompt, both branches.")
    ] = 8,
    height: Annotated[int | None, typer.Option("--height", min=16)] = None,
    width: Annotated[int | None, typer.Option("--width", min=16)] = None,
    num_frames: Annotated[int | None, typer.Option("--num-frames", min=1)] = None,
    flow_shift: Annotated[float | None, typer.Option("--flow-shift", help="Shift of the noise schedule.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="Guidance of the high-noise (or only) expert.")
    ] = None,
    guidance_scale_2: Annotated[
        float | None, typer.Option("--guidance-scale-2", help="Guidance of the low-noise expert.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", help="Default: the model's.")] = None,
    media_root: Annotated[list[Path] | None, typer.Option("--media-root", help="Folder with the clips.")] = None,
    exclude: Annotated[
        Path | None, typer.Option("--exclude", help="Prompt file whose prompts must not be used.")
    ] = None,
    prompt_format: Annotated[str | None, typer.Option("--prompt-format", help="Instead of detecting it.")] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out prompts without their image.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Base seed of the initial latents.")] = 0,
    shard: Annotated[
        str | None,
        typer.Option("--shard", help="Record part i of N, from 0, as i/N. Default: what torchrun or SLURM says."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda, cuda:1, cpu. Default: the process's GPU, else the CPU.")
    ] = None,
    offload: Annotated[
        str, typer.Option("--offload", help="Weights to the CPU between uses: none, model or sequential.")
    ] = "none",
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw an earlier run in --out away.")] = False,
    check: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="Check weights, disk and memory before starting.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with estimates and stop.")] = False,
) -> None:
    """Run the original model on calibration prompts and record denoiser inputs. Resumes where it stopped.

    Example: ptq calibrate tiny --prompts prompts.txt --num-prompts 8 --out calibration
    """
    from ptq import ui
    from ptq.calibration.plan import describe_plan, estimate_needs, prompts_left
    from ptq.calibration.run import CalibrationPlan
    from ptq.calibration.run import calibrate as run
    from ptq.cli.common import default_device, quiet_libraries, resolve_shard
    from ptq.prompts import read_prompts, require_media
    from ptq.wan.loading import resolve_model
    from ptq.wan.pipeline import check_offload
    from ptq.wan.preflight import preflight

    device = device or default_device()
    check_offload(device, offload)
    part = resolve_shard(shard)
    layout = resolve_model(model)
    overrides: dict[str, Any] = {"steps": steps, "height": height, "width": width, "num_frames": num_frames}
    overrides |= {"flow_shift": flow_shift, "guidance_scale": guidance_scale, "guidance_scale_2": guidance_scale_2}
    overrides |= {"negative_prompt": negative_prompt}
    preset = layout.resolve_preset(**overrides)
    found = read_prompts(
        prompts, prompt_format=prompt_format, limit=num_prompts, exclude=exclude, media_root=media_root or ()
    )
    samples = require_media(found, skip_missing=skip_missing) if layout.needs_image else found.samples
    source = {"name": found.path.name, "sha256": found.sha256}
    plan = CalibrationPlan(layout, preset, samples, records_per_prompt, seed, source)
    if dry_run:
        ui.facts("Calibration plan", describe_plan(plan, out, part, device, offload))
        return
    quiet_libraries()
    if check and (fresh or prompts_left(plan, out, part)):
        preflight(layout, lambda: estimate_needs(plan, out, part, device, offload), out, device)
    settings = run(plan, lambda: _load(layout, device, offload), out, shard=part, fresh=fresh)
    records = len(samples) * len(plan.branches) * plan.steps_per_prompt
    if settings["complete"]:
        ui.info(
            f"{records} records of {len(samples)} prompts in {out}. Next: ptq quantize {model} --calibration {out} ..."
        )
    else:
        ui.info(f"This shard is done; records of other shards are still missing in {out}.")


def _load(layout: ModelLayout, device: str, offload: str) -> Any:
    import torch

    from ptq.wan.loading import load_pipeline
    from ptq.wan.pipeline import place_pipeline

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return place_pipeline(load_pipeline(layout.path, dtype=dtype), device, offload)
