"""`ptq generate MODEL`: videos of prompts, resumable, over any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ptq.generation import Plan, Settings, Summary
    from ptq.prompts import Sample
    from ptq.wan.layout import ModelLayout


def generate(
    model: Annotated[str, typer.Argument(help="Hub id, diffusers directory, packed checkpoint, or `tiny`.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the run; the same command continues it.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Prompt file: .json, .jsonl or .txt.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Picture that --prompt starts from.")] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Use the first N prompts.")] = None,
    samples_per_prompt: Annotated[int, typer.Option(min=1, help="Videos of each prompt.")] = 1,
    prompt_format: Annotated[
        str | None, typer.Option(help="Format of the prompt file, instead of detecting it.")
    ] = None,
    media_root: Annotated[
        list[Path] | None, typer.Option(help="Folder below which pictures and clips are; may be given several times.")
    ] = None,
    exclude: Annotated[Path | None, typer.Option(help="Leave out prompts that this file has too.")] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out prompts without their image.")
    ] = False,
    image_to_video: Annotated[
        bool, typer.Option("--image-to-video", help="TI2V-5B: start from the images of the prompt file.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of each video, 4 n + 1.")] = None,
    fps: Annotated[int | None, typer.Option(min=1, help="Frames a second of the video file.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance of the high-noise (or only) expert.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="Guidance of the low-noise expert.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Default: the model's.")] = None,
    max_sequence_length: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Base seed; each unit adds its own number.")] = 0,
    save_frames: Annotated[
        bool, typer.Option("--save-frames", help="Also keep frames as npz, before encoding.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(help="Make part i of N, from 0, as i/N. Default: what torchrun or SLURM says.")
    ] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="When done, make what other shards leave unfinished.")
    ] = False,
    stale_minutes: Annotated[float, typer.Option(min=0.1, help="A process silent for so long counts as dead.")] = 10.0,
    retries: Annotated[int, typer.Option(min=0, help="Further attempts at a unit that failed.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the run made and start over.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu. Default: the process's GPU, else the CPU.")
    ] = None,
    context_parallel: Annotated[
        int, typer.Option("--context-parallel", min=1, help="GPUs that make each video together, under torchrun.")
    ] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: bfloat16 on a GPU.")] = None,
    offload: Annotated[str, typer.Option(help="Weights to the CPU between uses: none, model or sequential.")] = "none",
    attention_backend: Annotated[str | None, typer.Option(help="Attention backend of diffusers.")] = None,
    check: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="Check weights, disk and memory before starting.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and estimates, do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generate videos; the same command again continues where it stopped.

    Example: ptq generate out/hif4 --prompts prompts.txt --out runs/hif4 --samples-per-prompt 5
    """
    from ptq.cli.common import default_device, quiet_libraries, resolve_shard
    from ptq.generation import identify_model, plan_run, run_generation
    from ptq.wan.loading import resolve_model

    layout = resolve_model(model)
    from_image = layout.starts_from_image(image_to_video or image is not None)
    device = device or default_device()
    overrides = {
        "steps": steps,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "fps": fps,
        "flow_shift": flow_shift,
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "negative_prompt": negative_prompt,
        "max_sequence_length": max_sequence_length,
    }
    settings = _resolve_settings(
        layout,
        overrides,
        seed=seed,
        dtype=_resolve_dtype(dtype, device),
        image_to_video=from_image,
        save_frames=save_frames,
        attention_backend=attention_backend,
        context_parallel=context_parallel,
    )
    reading = {"prompt_format": prompt_format, "limit": num_prompts, "exclude": exclude, "media_root": media_root or ()}
    samples, source = _resolve_samples(prompt, prompts, image, from_image, skip_missing, reading)
    part = resolve_shard(shard if context_parallel == 1 else shard or "0/1")
    identity = identify_model(model, layout.path)
    plan = plan_run(samples, settings, out, shard=part, samples_per_prompt=samples_per_prompt, fresh=fresh)
    if dry_run:
        _show_plan(plan, settings, identity.weight_bytes, as_json)
        return
    quiet_libraries()
    if context_parallel > 1:
        _check_group(settings, device, offload)
    if check and plan.to_make:
        _preflight(layout, settings, plan.bytes_needed, out, device, offload)
    if context_parallel > 1 and not _lead_group(layout, settings, device):
        return
    summary = run_generation(
        lambda: _load(layout, settings),
        samples,
        settings,
        out,
        model=identity,
        shard=part,
        samples_per_prompt=samples_per_prompt,
        prompts=source,
        fresh=fresh,
        retries=retries,
        take_over=take_over,
        stale_minutes=stale_minutes,
        device=device,
        offload=offload,
    )
    if context_parallel > 1:
        from ptq.generation.group import dismiss_group

        dismiss_group()
    _show_summary(summary, out, as_json)
    if summary.remaining:
        raise typer.Exit(1)


def _check_group(settings: Settings, device: str, offload: str) -> None:
    import os

    from ptq.generation.group import check_group

    check_group(settings, os.environ, device, offload)


def _lead_group(layout: ModelLayout, settings: Settings, device: str) -> bool:
    """Join the group; True in its leader. The others follow and come back when the leader is done."""
    from ptq.generation.group import follow, join_group
    from ptq.generation.sampling import Sampler

    if join_group(device) == 0:
        return True
    follow(lambda: Sampler(_load(layout, settings), settings, device))
    return False


def _preflight(layout: ModelLayout, settings: Settings, disk: int, out: Path, device: str, offload: str) -> None:
    """Check weights, disk, memory and a trial checkpoint before the model is loaded."""
    from ptq.wan.estimates import sampling_memory
    from ptq.wan.pipeline import check_offload
    from ptq.wan.preflight import Needs, preflight

    check_offload(device, offload)
    names = ("height", "width", "num_frames", "max_sequence_length")
    preset = layout.preset.model_copy(update={name: getattr(settings, name) for name in names})

    def estimate() -> Needs:
        memory = sampling_memory(layout, preset, device, offload, decode=True)
        return Needs(disk, memory["ram"], memory["vram"])

    preflight(layout, estimate, out, device)


def _load(layout: ModelLayout, settings: Settings) -> Any:
    import torch

    from ptq.wan.loading import load_pipeline

    return load_pipeline(layout.path, dtype=getattr(torch, settings.dtype))


def _resolve_dtype(dtype: str | None, device: str) -> str:
    from ptq.errors import UsageError

    if dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"--dtype must be float32 or bfloat16, found {dtype!r}.")
    return dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def _resolve_settings(layout: ModelLayout, overrides: dict[str, Any], **others: Any) -> Settings:
    """The preset's values, each replaced where the command line has its own."""
    from ptq.generation import Settings

    return Settings(**layout.resolve_preset(**overrides).model_dump(exclude={"variant", "hub_id"}), **others)


def _resolve_samples(
    prompt: str | None,
    prompts: Path | None,
    image: Path | None,
    from_image: bool,
    skip_missing: bool,
    reading: dict[str, Any],
) -> tuple[list[Sample], dict[str, Any] | None]:
    """The samples, and what `run.json` keeps about the file they come from."""
    from ptq.errors import UsageError
    from ptq.prompts import read_prompts, require_media

    if (prompt is None) == (prompts is None):
        raise UsageError("Give either --prompt TEXT or --prompts FILE.")
    if prompt is not None:
        return [_single_sample(prompt, image, from_image)], None
    if image is not None:
        raise UsageError("--image belongs to --prompt TEXT; a prompt file names its own images.")
    found = read_prompts(str(prompts), **reading)
    samples = require_media(found, skip_missing=skip_missing) if from_image else found.samples
    return samples, {"file": str(prompts), "format": found.format, "sha256": found.sha256, "samples": len(samples)}


def _single_sample(prompt: str, image: Path | None, from_image: bool) -> Sample:
    import hashlib

    from ptq.errors import UsageError
    from ptq.prompts import MediaRef, Sample

    if not prompt.strip():
        raise UsageError("--prompt is empty.")
    if from_image and image is None:
        raise UsageError("An image-to-video model starts from a picture: add --image FILE.")
    if image is not None and not image.is_file():
        raise UsageError(f"The image {image} does not exist.")
    media = MediaRef("image", str(image), resolved=image) if image is not None else None
    name = hashlib.sha1(prompt.encode(), usedforsecurity=False).hexdigest()[:12]
    return Sample("prompt", name, prompt, prompt, media)


def _show_summary(summary: Summary, out: Path, as_json: bool) -> None:
    from ptq import ui
    from ptq.cli.common import print_json

    if as_json:
        print_json(summary.as_json())
    ui.info(f"{out}: {summary.describe()}")
    for name, error in summary.failed.items():
        ui.warn(f"{name}: {error}")
    if summary.remaining:
        ui.info("Run the same command again to make the units that remain.")


def _show_plan(plan: Plan, settings: Settings, weight_bytes: int, as_json: bool) -> None:
    from ptq import ui
    from ptq.cli.common import format_bytes, print_json
    from ptq.ui.progress import format_seconds

    if as_json:
        value = {**plan.as_json(), "weight_bytes": weight_bytes, "settings": settings.as_json()}
        print_json(value)
        return
    rows = [
        ("units of the run", plan.units),
        (f"units of shard {plan.shard.index}/{plan.shard.count}", plan.own),
        ("done already", plan.done),
        ("to make", plan.to_make),
        ("video", f"{settings.width}x{settings.height}, {settings.num_frames} frames, {settings.steps} steps"),
        ("disk, estimated", f"{format_bytes(plan.bytes_needed)} ({format_bytes(plan.free_bytes)} free)"),
        ("weights on disk", f"{format_bytes(weight_bytes)}; loading takes as much memory"),
        ("time, estimated", "known after the first video" if plan.seconds is None else format_seconds(plan.seconds)),
    ]
    ui.facts("Plan", dict(rows))
