"""`ptq generate MODEL`: videos of prompts, resumable, over any number of processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import default_device, describe_out, print_json, quiet_libraries, resolve_shard

if TYPE_CHECKING:
    from ptq.generation import Plan, Settings, Summary
    from ptq.wan.estimates import SamplingMemory


def generate(
    model: Annotated[str, typer.Argument(help=f"{options.MODEL_HELP[:-1]}; also a packed checkpoint.")],
    out: Annotated[Path, options.OUT],
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt.")] = None,
    prompts: Annotated[Path | None, options.PROMPTS] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Picture that --prompt starts from.")] = None,
    num_prompts: options.NumPrompts = None,
    samples_per_prompt: Annotated[
        int, typer.Option("--samples-per-prompt", min=1, max=10_000, help="Videos of each prompt.")
    ] = 1,
    prompt_format: options.PromptFormat = None,
    media_root: options.MediaRoot = None,
    exclude: options.Exclude = None,
    skip_missing: options.SkipMissing = False,
    image_to_video: Annotated[
        bool, typer.Option("--image-to-video", help="TI2V-5B: start from the images of the prompt file.")
    ] = False,
    preset: options.Preset = None,
    lora: options.Lora = None,
    lora_2: options.Lora2 = None,
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    fps: Annotated[int | None, typer.Option("--fps", min=1, max=240, help="Frames a second of the video file.")] = None,
    flow_shift: options.FlowShift = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_scale_2: options.GuidanceScale2 = None,
    negative_prompt: options.NegativePrompt = None,
    max_sequence_length: Annotated[
        int | None, typer.Option("--max-sequence-length", min=1, max=100_000, help="Tokens of the prompt.")
    ] = None,
    seed: Annotated[int | None, options.seed(f"{options.SEED_HELP} Default: 0.")] = None,
    seed_scheme: Annotated[
        str | None,
        typer.Option(
            "--seed-scheme", help="Seeds: unit (each its own number, the default), vbench (100000 i + j) or same."
        ),
    ] = None,
    fixed_latent: Annotated[
        Path | None, typer.Option("--fixed-latent", help="Safetensors file: the noise that every video starts from.")
    ] = None,
    save_frames: Annotated[
        bool, typer.Option("--save-frames", help="Also keep frames as npz, before encoding.")
    ] = False,
    shard: options.Shard = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="When done, make what other shards leave unfinished.")
    ] = False,
    stale_minutes: Annotated[
        float, options.number("--stale-minutes", 0.1, 1e5, "A process silent for so long counts as dead.")
    ] = 10.0,
    retries: Annotated[
        int, typer.Option("--retries", min=0, max=1000, help="Further attempts at a unit that failed.")
    ] = 1,
    fresh: options.Fresh = False,
    device: options.Device = None,
    context_parallel: Annotated[
        int, typer.Option("--context-parallel", min=1, help="GPUs that make each video together, under torchrun.")
    ] = 1,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 or bfloat16. Default: bfloat16 on a GPU.")
    ] = None,
    offload: options.Offload = "none",
    attention_backend: Annotated[
        str | None, typer.Option("--attention-backend", help="fa3, fa3-fp8, or one of diffusers.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="Skip steps that hardly change: first-block or first-block:THRESHOLD.")
    ] = None,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks first: faster steps on a GPU.")
    ] = False,
    check: options.Preflight = True,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Generate videos; the same command again continues where it stopped.

    Example: ptq generate out/hif4 --prompts prompts.txt --out runs/hif4 --samples-per-prompt 5
    """
    from ptq import generation
    from ptq.generation.directory import GenerationDirectory
    from ptq.wan.attention import check_attention
    from ptq.wan.loading import find_model
    from ptq.wan.lora import choose_loras
    from ptq.wan.pipeline import check_offload

    check_offload(device, offload)
    layout = find_model(model)
    from_image = layout.starts_from_image(image_to_video or image is not None)
    given = {
        "named": preset,
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
    settings = generation.resolve_settings(
        layout,
        given,
        dtype=dtype,
        seed=seed,
        seed_scheme=seed_scheme,
        image_to_video=from_image,
        save_frames=save_frames,
        attention_backend=attention_backend,
        context_parallel=context_parallel,
        cache=cache,
        compile=compile_blocks,
    )
    settings, fixed = generation.start_from(fixed_latent, layout, settings)
    settings.check_samples(samples_per_prompt)
    generation.check_compile(settings, device, offload)
    check_attention(attention_backend, dtype, context_parallel, device)
    reading = {"prompt_format": prompt_format, "limit": num_prompts, "exclude": exclude, "media_root": media_root or ()}
    samples, source = generation.read_samples(
        prompt, prompts, image, from_image=from_image, skip_missing=skip_missing, **reading
    )
    merged = choose_loras(layout, lora, lora_2)
    part = resolve_shard(shard if context_parallel == 1 else shard or "0/1", out)
    GenerationDirectory(out).refuse_foreign(locked=False)
    ui.info(f"{'Planning' if dry_run else 'Generating'} videos of {len(samples)} prompts with {model}.")

    from ptq.wan.check import check_model

    quiet_libraries()
    check_model(layout)
    device = device or default_device()
    check_offload(device, offload)
    generation.check_compile(settings, device, offload)
    settings = settings if dtype else generation.for_device(settings, device)
    check_attention(attention_backend, settings.dtype, context_parallel, device)
    identity = generation.identify_model(model, layout.path)
    if merged:
        identity = dataclasses.replace(identity, loras=merged)
    plan = generation.plan_run(samples, settings, out, shard=part, samples_per_prompt=samples_per_prompt, fresh=fresh)
    if dry_run:
        memory = generation.estimate_memory(layout, settings, device, offload)
        where = "RAM, estimated" if device == "cpu" else f"GPU memory, --offload {offload}"
        if plan.seconds_per_unit is None:
            ui.info("Timing a block of the model.")
            plan = dataclasses.replace(plan, seconds_per_unit=generation.estimate_seconds(layout, settings, device))
        shown = describe_out(out, out, fresh=fresh)
        _show_plan(plan, settings, identity.weight_bytes, shown, (where, memory), as_json)
        return
    summary = generation.make_videos(
        layout,
        samples,
        settings,
        out,
        disk=plan.bytes_needed if check and plan.to_make else None,
        device=device,
        offload=offload,
        fixed=fixed,
        model=identity,
        shard=part,
        samples_per_prompt=samples_per_prompt,
        prompts=source,
        fresh=fresh,
        retries=retries,
        take_over=take_over,
        stale_minutes=stale_minutes,
    )
    if summary is None:
        return
    _show_summary(summary, out, as_json)
    if summary.remaining:
        raise typer.Exit(1)


def _show_summary(summary: Summary, out: Path, as_json: bool) -> None:

    if as_json:
        print_json(summary.as_json())
    ui.info(f"{out}: {summary.describe()}")
    for name, error in summary.failed.items():
        ui.warn(f"{name}: {error}")
    if summary.remaining:
        ui.info("Run the same command again to make the units that remain.")


def _show_plan(
    plan: Plan,
    settings: Settings,
    weight_bytes: int,
    directory: str,
    memory: tuple[str, SamplingMemory],
    as_json: bool,
) -> None:
    from ptq.generation.units import SEED_SCHEMES

    if as_json:
        sizes = {"weight_bytes": weight_bytes, "memory": vars(memory[1])}
        value = {**plan.as_json(), **sizes, "settings": settings.as_json()}
        print_json(value)
        return
    rows = [
        ("directory", directory),
        ("units of the run", plan.units),
        (f"units of shard {plan.shard.index}/{plan.shard.count}", plan.own),
        ("done already", plan.done),
        ("to make", plan.to_make),
        ("video", f"{settings.width}x{settings.height}, {settings.num_frames} frames, {settings.steps} steps"),
        *([("cache", settings.cache)] if settings.cache else []),
        *([("seeds", SEED_SCHEMES[settings.seed_scheme])] if settings.seed_scheme != "unit" else []),
        *([("fixed latent, SHA-256", settings.fixed_latent)] if settings.fixed_latent else []),
        ("disk, estimated", f"{ui.format_bytes(plan.bytes_needed)} ({ui.format_bytes(plan.free_bytes)} free)"),
        ("weights on disk", ui.format_bytes(weight_bytes)),
        (memory[0], memory[1].describe()),
        ("time, estimated", ui.format_seconds(plan.seconds or 0.0)),
    ]
    ui.details("Plan", dict(rows))
