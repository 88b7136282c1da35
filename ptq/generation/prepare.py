"""From what a user asked for to a run: samples, settings, the checks before the model is loaded, one process or a group.

`ptq generate` and `ptq demo` come in here; which units are made, and how often, is `run.py`'s. The model is loaded with the
first unit, torch with the first check.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq import ui
from ptq.checkpoint.manifest import MANIFEST_FILE
from ptq.errors import UsageError
from ptq.generation.directory import GenerationDirectory
from ptq.generation.latent import FixedLatent, read_latent
from ptq.generation.run import Summary, run_generation
from ptq.generation.settings import Settings, departures
from ptq.prompts import Sample, make_sample, read_prompts, require_media
from ptq.store.embeddings import FOLDER as EMBEDDINGS
from ptq.store.files import read_json
from ptq.store.run_directory import STATE_DIR
from ptq.wan.caching import check_cache, normal_cache
from ptq.wan.encoding import TextEncoding, load_denoiser
from ptq.wan.identity import ModelIdentity
from ptq.wan.layout import ModelLayout
from ptq.wan.presets import SAMPLING, ModelPreset, run_settings

if TYPE_CHECKING:
    from ptq.wan.estimates import SamplingMemory

DTYPES = ("float32", "bfloat16")


def resolve_settings(
    layout: ModelLayout,
    given: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
    cache: str | None = None,
    seed: int | None = None,
    seed_scheme: str | None = None,
    **others: Any,
) -> Settings:
    """The preset's values, each replaced where `given` has its own (None: the preset's).

    Args:
        dtype: None is float32, until `for_device`.
        cache: as a user types it.
        seed, seed_scheme: None is what the named preset says, or else the default of `Settings`.
        others: fields of `Settings` that no preset has.

    Raises:
        UsageError: a value that cannot be.
    """
    if dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype must be {' or '.join(DTYPES)}, found {dtype!r}.")
    values = layout.resolve_preset(**(given or {})).model_dump(exclude={"variant", "hub_id"})
    named = run_settings((given or {}).get("named"))
    if seed_scheme not in (None, named.get("seed_scheme")):
        named = {}  # its seed is one of its scheme
    chosen: dict[str, Any] = {"seed": seed, "seed_scheme": seed_scheme}
    seeds = named | {key: value for key, value in chosen.items() if value is not None}
    settings = Settings(**values, dtype=dtype or DTYPES[0], cache=normal_cache(cache), **seeds, **others)
    check_cache(settings.cache, settings.steps, settings.context_parallel, min(map(layout.num_blocks, layout.experts)))
    differing = departures(settings, calibrated_with(layout), "calibrated with") if layout.is_packed else []
    if differing:
        ui.info(f"Other settings than the checkpoint was calibrated with: {', '.join(differing)}.")
    return settings


def start_from(latent: Path | None, layout: ModelLayout, settings: Settings) -> tuple[Settings, FixedLatent | None]:
    """The settings of a run whose every unit starts from the latent of this file, and that latent; None: as they are.

    Raises:
        UsageError, DamagedFileError: as `read_latent`.
    """
    if latent is None:
        return settings, None
    fixed = read_latent(latent, layout.latent_shape(settings.height, settings.width, settings.num_frames))
    return replace(settings, fixed_latent=fixed.digest), fixed


def for_device(settings: Settings, device: str) -> Settings:
    """The settings with the default dtype of a device: bfloat16 on a GPU."""
    return replace(settings, dtype="bfloat16" if device.startswith("cuda") else DTYPES[0])


def check_compile(settings: Settings, device: str | None, offload: str) -> None:
    """Refuse what compiled blocks have not been made for; device None: not known yet.

    Raises:
        UsageError: no GPU, offloading, step caching, or a video that several processes make.
    """
    if not settings.compile:
        return
    others = {
        f"--offload {offload}": offload != "none",
        f"--cache {settings.cache}": settings.cache is not None,
        f"--context-parallel {settings.context_parallel}": settings.context_parallel > 1,
    }
    if other := next((name for name, asked in others.items() if asked), None):
        raise UsageError(
            f"--compile was asked for with {other}: compiled blocks that are moved, skipped or split have not been measured. Leave out one of the two."
        )
    if device is not None and not device.startswith("cuda"):
        raise UsageError(f"--compile is for GPUs, and this run is on the device {device}. Leave it out.")


def calibrated_with(layout: ModelLayout) -> dict[str, Any]:
    """The settings of the records that a packed checkpoint was made from; {} where an earlier version did not note them."""
    manifest = layout.path / MANIFEST_FILE
    content = read_json(manifest) if manifest.is_file() else {}
    calibration = content.get("calibration") if isinstance(content, dict) else None
    settings = calibration.get("settings") if isinstance(calibration, dict) else None
    return settings if isinstance(settings, dict) else {}


def read_samples(
    prompt: str | None,
    prompts: str | Path | None,
    image: Path | None = None,
    *,
    from_image: bool,
    skip_missing: bool = False,
    **reading: Any,
) -> tuple[list[Sample], dict[str, Any] | None]:
    """The samples of one prompt (with its image) or of a file, and what `run.json` keeps about the file.

    Args:
        from_image: the run is image-to-video: every sample needs its picture.
        skip_missing: leave out samples whose picture is not here.
        reading: as `read_prompts` takes it.

    Raises:
        UsageError: both, none, or an image where none belongs. Otherwise as `read_prompts` and `require_media`.
    """
    if (prompt is None) == (prompts is None):
        raise UsageError("Give either --prompt TEXT or --prompts FILE.")
    if prompt is not None:
        if from_image and image is None:
            raise UsageError("An image-to-video model starts from a picture: add --image FILE.")
        return [make_sample(prompt, image)], None
    if image is not None:
        raise UsageError("--image belongs to --prompt TEXT; a prompt file names its own images.")
    found = read_prompts(str(prompts), skip_missing=skip_missing and from_image, **reading)
    samples = require_media(found, skip_missing=skip_missing) if from_image else found.samples
    return samples, {"file": str(prompts), "format": found.format, "sha256": found.sha256, "samples": len(samples)}


def make_videos(
    layout: ModelLayout,
    samples: Sequence[Sample],
    settings: Settings,
    out: Path,
    *,
    model: ModelIdentity,
    disk: int | None = None,
    device: str = "cpu",
    offload: str = "none",
    fixed: FixedLatent | None = None,
    **run: Any,
) -> Summary | None:
    """Check the machine and make this shard's videos; with context parallelism as one of the group that makes them.

    Args:
        model: which weights these are; its LoRAs are merged where the layout's are the original ones.
        disk: bytes that will be written; None skips the checks.
        fixed: the initial latent of every unit, where the settings name one.
        run: as `run_generation` takes it.

    Returns:
        What was done; None in a process that followed the leader of its group.

    Raises:
        PtqError: problems of the machine. Otherwise as `check_group` and `run_generation`.
    """

    folder, length = out / STATE_DIR / EMBEDDINGS, settings.max_sequence_length
    negative = settings.negative_prompt if _preset(layout, settings).guided else None
    encoding = TextEncoding(layout, folder, settings.dtype, length, negative, device, offload)

    def load() -> Any:
        from ptq.wan.merge import merge_into

        pipeline = load_denoiser(layout, settings.dtype)
        return pipeline if layout.is_packed else merge_into(pipeline, layout, model.loras)

    grouped = settings.context_parallel > 1
    if grouped:
        from ptq.generation.group import check_group, dismiss_group, follow, join_group
        from ptq.generation.sampling import Sampler

        check_group(settings, os.environ, device, offload)
    GenerationDirectory(out).refuse_foreign(locked=False)  # said before the machine is looked at
    if disk is not None:
        _check_machine(layout, settings, disk, out, device, offload)
    if grouped and join_group(device) != 0:
        follow(lambda: Sampler(load(), settings, device, fixed=fixed))
        return None
    summary = run_generation(
        load, samples, settings, out, model=model, device=device, offload=offload, encoding=encoding, fixed=fixed, **run
    )
    if grouped:
        dismiss_group()
    return summary


def estimate_memory(layout: ModelLayout, settings: Settings, device: str, offload: str) -> SamplingMemory:
    """What making a video takes."""
    from ptq.wan.estimates import sampling_memory

    return sampling_memory(layout, _preset(layout, settings), device, offload, decode=True)


def estimate_seconds(layout: ModelLayout, settings: Settings, device: str) -> float:
    """How long denoising a video takes, every step computed. Times a block; no LoRA is merged into it."""
    from ptq.wan.estimates import call_size
    from ptq.wan.speed import call_seconds

    preset = _preset(layout, settings)
    return preset.calls * call_seconds(layout, call_size(layout, preset), device)


def _preset(layout: ModelLayout, settings: Settings) -> ModelPreset:
    return layout.preset.model_copy(update={name: getattr(settings, name) for name in SAMPLING})


def _check_machine(layout: ModelLayout, settings: Settings, disk: int, out: Path, device: str, offload: str) -> None:
    """Weights, disk, memory and a trial checkpoint."""
    from ptq.wan.pipeline import check_offload
    from ptq.wan.preflight import Needs, preflight

    check_offload(device, offload)

    def estimate() -> Needs:
        memory = estimate_memory(layout, settings, device, offload)
        return Needs(disk, memory.ram, memory.vram)

    preflight(estimate, out, device, state=out / STATE_DIR)
