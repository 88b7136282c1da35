"""The quantize stage: a model and its calibration records in, a packed checkpoint out. Resumable per block."""

from __future__ import annotations

import contextlib
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ptq import formats, ui
from ptq.calibration.records import CalibrationSet
from ptq.checkpoint.manifest import Manifest, hash_files, package_versions, read_manifest, write_manifest
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.shards import MAX_SHARD_BYTES, ShardSet
from ptq.errors import PtqError, UsageError
from ptq.quantization.assemble import copy_components, write_expert
from ptq.quantization.calls import spread
from ptq.quantization.coverage import measure_coverage, recorded_call
from ptq.quantization.expert import ExpertResult, ExpertRun
from ptq.quantization.processes import Processes
from ptq.quantization.sensitivity import protect_blocks, with_protection
from ptq.quantization.settings import QuantizeSettings, check_budget
from ptq.quantization.workdir import RUN_FILES, STREAMS_DIR, WorkDir
from ptq.store.files import digest, free_space_hint
from ptq.store.locks import exclusive
from ptq.version import __version__
from ptq.wan.layout import ModelLayout
from ptq.wan.replay import ExpertReplay, state_names


@dataclass(frozen=True)
class QuantizeOptions:
    """How to run, without influence on the codes.

    Attributes:
        device: of the replay.
        max_memory: bytes that the two streams of hidden states may take in RAM; beyond, they are memory-mapped files.
        link: link unchanged components instead of copying them.
        fresh: discard an unfinished run.
        max_shard_bytes: limit of a weight file.
    """

    device: str = "cpu"
    max_memory: int | None = None
    link: bool = False
    fresh: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES


def quantize(
    layout: ModelLayout,
    calibration: CalibrationSet,
    settings: QuantizeSettings,
    out: Path,
    options: QuantizeOptions = QuantizeOptions(),
) -> Manifest:
    """Quantize every expert of a Wan pipeline and write the packed checkpoint.

    Args:
        layout: the original pipeline.
        calibration: records made from this pipeline.
        settings: format, recipe, protected blocks.
        out: directory to create; it appears only when complete.
        options: device, memory, linking.

    Returns:
        The checkpoint's manifest.

    Raises:
        UsageError: `out` exists, an unfinished run of other settings, records of another model, over the block budget.
        PtqError: another process makes `out`; damaged or missing weights, NaN weights, disk full. Finished blocks are
            kept for the next try.
    """
    start = time.monotonic()
    check_inputs(layout, calibration, settings)
    calibration.verify()
    shards = {expert: ShardSet(layout.path / expert) for expert in layout.experts}
    signature = run_signature(layout, shards, calibration, settings)
    processes = Processes.from_environment()
    lock = exclusive(out.with_name(f".{out.name}.lock"), str(out)) if processes.first else contextlib.nullcontext()
    with lock:
        return _quantize(layout, shards, calibration, settings, signature, out, options, processes, start)


def _quantize(
    layout: ModelLayout,
    shards: dict[str, ShardSet],
    calibration: CalibrationSet,
    settings: QuantizeSettings,
    signature: dict[str, Any],
    out: Path,
    options: QuantizeOptions,
    processes: Processes,
    start: float,
) -> Manifest:
    work = WorkDir(out, signature, fresh=options.fresh and processes.first)
    processes.wait()
    if not work.is_complete:
        results = _run_experts(layout, shards, calibration, settings, work, options, processes)
        if settings.auto_protect:
            if processes.first:
                protect_blocks(layout, shards, calibration, settings, work, options.device)
            processes.wait()
            settings = with_protection(settings, work, list(layout.experts))
            results = _run_experts(layout, shards, calibration, settings, work, options, processes)
        if processes.first:
            work.remove_leftovers()
            copy_components(layout, work.path, link=options.link)
            manifest = _manifest(layout, shards, calibration, settings, signature, results, time.monotonic() - start)
            manifest.files = hash_files(work.path, exclude=RUN_FILES)
            write_manifest(work.path, manifest)
    processes.wait()
    if processes.first:
        work.finish()
    processes.wait()
    return read_manifest(out)


def _run_experts(
    layout: ModelLayout,
    shards: dict[str, ShardSet],
    calibration: CalibrationSet,
    settings: QuantizeSettings,
    work: WorkDir,
    options: QuantizeOptions,
    processes: Processes,
) -> list[ExpertResult]:
    """Quantize (or replay finished) blocks of every expert and write its shards into the work directory."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    results: list[ExpertResult] = []
    with ui.progress("Quantizing blocks", sum(layout.num_blocks(expert) for expert in layout.experts)) as bar:
        for expert, config in layout.experts.items():
            replay = ExpertReplay(shards[expert], config, options.device, dtype)
            limit = settings.recipe.record_limit
            scratch = stream_scratch(layout, expert, calibration, work.path, options.max_memory, limit)
            result = ExpertRun(expert, replay, calibration, settings, work, scratch, processes).run(bar)
            results.append(result)
            if not processes.first:
                continue
            packed = PackedConfig.build(
                settings.spec, layout.linear_shapes(expert), settings.high_precision.get(expert, {})
            )
            names = state_names(config, packed)
            limit = options.max_shard_bytes
            write_expert(work.path / expert, config, packed, names, shards[expert], result.changed, limit)
    return results


def check_inputs(layout: ModelLayout, calibration: CalibrationSet, settings: QuantizeSettings) -> None:
    """Refuse contradictory inputs before any work.

    Raises:
        UsageError: packed input, records of another model or of only one expert, widths that do not fit the format or
            the rotation, too many protected blocks.
    """
    if layout.is_packed:
        raise UsageError(f"{layout.path} is already a packed checkpoint; quantize the original model instead.")
    experts = {name: digest(config) for name, config in layout.experts.items()}
    if calibration.settings.get("experts") != experts:
        raise UsageError(
            f"{calibration.directory} was recorded from another model than {layout.path} (experts or their config.json differ). Record this model with `ptq calibrate` first."
        )
    recorded_as = calibration.settings.get("variant")
    if recorded_as != layout.variant.name:
        raise UsageError(
            f"{calibration.directory} was recorded from {layout.variant.title} taken for {recorded_as}, with the flow shift and steps of that. Record this model again with `ptq calibrate`, into another --out."
        )
    for expert in layout.experts:
        if not calibration.of_expert(expert):
            raise UsageError(
                f"{calibration.directory} has no records of {expert}. Record more steps (--steps, --records-per-prompt) so that every expert is called."
            )
        _check_widths(layout, expert, settings)
    check_budget(settings.format, settings.high_precision, settings.budget_scope)


def _check_widths(layout: ModelLayout, expert: str, settings: QuantizeSettings) -> None:
    multiple = max(formats.get(settings.format).group_size, settings.recipe.rotation)
    for name, (_, k) in layout.linear_shapes(expert).items():
        if k % multiple:
            raise UsageError(
                f"{expert} of {layout.path}: {name} has {k} input channels, not a multiple of {multiple} ({settings.format} group {formats.get(settings.format).group_size}, rotation {settings.recipe.rotation}). Choose another format or rotation (--set rotation=...)."
            )


def run_signature(
    layout: ModelLayout, shards: dict[str, ShardSet], calibration: CalibrationSet, settings: QuantizeSettings
) -> dict[str, Any]:
    """Everything that decides the codes; two runs with equal signatures may share finished blocks."""
    recipe = settings.recipe.model_dump(mode="json", exclude={"description"})
    return {
        "model": base_model_identity(layout, shards),
        "calibration": calibration.digest,
        "format": settings.format,
        "recipe": recipe,
        "high_precision": "auto"
        if settings.auto_protect
        else {expert: list(blocks) for expert, blocks in settings.high_precision.items()},
        "budget_scope": settings.budget_scope,
        "seed": settings.seed,
        "versions": package_versions(),
    }


def base_model_identity(layout: ModelLayout, shards: dict[str, ShardSet]) -> dict[str, Any]:
    """Identity of the original: configurations, and names, sizes and tensor tables of its weight files."""
    files = {
        f"{expert}/{file.name}": {
            "bytes": file.stat().st_size,
            "tensors": digest(
                [[e.name, e.dtype, list(e.shape), e.start] for e in shard.entries.values() if e.file == file]
            ),
        }
        for expert, shard in shards.items()
        for file in shard.files
    }
    return {
        "variant": layout.preset.variant,
        "hub_id": layout.preset.hub_id,
        "configs": {name: digest(config) for name, config in layout.experts.items()},
        "files": files,
    }


def stream_scratch(
    layout: ModelLayout,
    expert: str,
    calibration: CalibrationSet,
    work: Path,
    max_memory: int | None,
    record_limit: int | None,
) -> Path | None:
    """Where the streams of hidden states go: None (RAM) when both fit, otherwise a scratch folder.

    Raises:
        PtqError: neither fits.
    """
    records = spread(calibration.of_expert(expert), record_limit)
    need = 2 * 4 * layout.width(expert) * recorded_call(layout, calibration, expert).tokens * len(records)
    limit = max_memory if max_memory is not None else psutil.virtual_memory().available // 2
    if need <= limit:
        return None
    if psutil.disk_usage(str(work)).free < need:
        raise PtqError(
            f"The hidden states of {len(records)} records of {expert} take {need / 1e9:.1f} GB, more than the memory limit of {limit / 1e9:.1f} GB and than the disk offers. {free_space_hint(work)}"
        )
    ui.info(f"Hidden states of {expert} take {need / 1e9:.1f} GB: kept in memory-mapped files under {work}.")
    return work / STREAMS_DIR


def _manifest(
    layout: ModelLayout,
    shards: dict[str, ShardSet],
    calibration: CalibrationSet,
    settings: QuantizeSettings,
    signature: dict[str, Any],
    results: list[ExpertResult],
    seconds: float,
) -> Manifest:
    used = calibration.settings
    return Manifest(
        package_version=__version__,
        versions=package_versions(),
        format=settings.format,
        variant=layout.preset.variant,
        base_model=signature["model"],
        recipe_name=settings.recipe_name,
        recipe=settings.recipe.model_dump(mode="json"),
        calibration={
            "digest": calibration.digest,
            "prompts": used["prompts"],
            "samples": used["samples"],
            "records": len(calibration.records),
        },
        high_precision=[f"{name}:{index}" for name, blocks in settings.high_precision.items() for index in blocks],
        budget_scope=settings.budget_scope,
        coverage=measure_coverage(layout, shards, calibration, settings),
        experts=[result.summary for result in results],
        blocks=[row for result in results for row in result.blocks],
        layers=[row for result in results for row in result.layers],
        signature=digest(signature),
        seconds=round(seconds, 3),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        files={},
    )
