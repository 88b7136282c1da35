"""`ptq calibrate`: record what the denoiser is called with on calibration prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    media_root: Annotated[list[Path] | None, typer.Option("--media-root", help="Folder with the clips.")] = None,
    exclude: Annotated[
        Path | None, typer.Option("--exclude", help="Prompt file whose prompts must not be used.")
    ] = None,
    prompt_format: Annotated[str | None, typer.Option("--prompt-format", help="Instead of detecting it.")] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out prompts without their image.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Base seed of the initial latents.")] = 0,
    shard: Annotated[str, typer.Option("--shard", help="Record only part i of N (i/N).")] = "0/1",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw an earlier run in --out away.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Run the original model on calibration prompts and record denoiser inputs. Resumes where it stopped.

    Example: ptq calibrate tiny --prompts prompts.txt --num-prompts 8 --out calibration
    """
    from ptq import ui
    from ptq.calibration.run import CalibrationPlan
    from ptq.calibration.run import calibrate as run
    from ptq.cli.common import parse_shard, quiet_libraries
    from ptq.prompts import read_prompts, require_media
    from ptq.wan.loading import load_pipeline, resolve_model

    index, count = parse_shard(shard)
    layout = resolve_model(model)
    overrides = {"steps": steps, "height": height, "width": width, "num_frames": num_frames}
    preset = layout.preset.model_copy(update={key: value for key, value in overrides.items() if value is not None})
    found = read_prompts(
        prompts, prompt_format=prompt_format, limit=num_prompts, exclude=exclude, media_root=media_root or ()
    )
    needs_images = layout.pipeline_class == "WanImageToVideoPipeline"
    samples = require_media(found, skip_missing=skip_missing) if needs_images else found.samples
    plan = CalibrationPlan(
        layout, preset, samples, records_per_prompt, seed, {"name": found.path.name, "sha256": found.sha256}
    )
    if dry_run:
        ui.table("Calibration plan", ("", "value"), plan.describe().items())
        return
    quiet_libraries()
    settings = run(plan, lambda: load_pipeline(model, device=device), out, shard=(index, count), fresh=fresh)
    records = len(samples) * len(plan.branches) * plan.steps_per_prompt
    if settings["complete"]:
        ui.info(
            f"{records} records of {len(samples)} prompts in {out}. Next: ptq quantize {model} --calibration {out} ..."
        )
    else:
        ui.info(f"This shard is done; records of other shards are still missing in {out}.")
