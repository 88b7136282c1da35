"""The quantize stage: a model and its calibration records in, a packed checkpoint out. Resumable per block."""

from __future__ import annotations

import contextlib
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from ptq import ui
from ptq.checkpoint.manifest import Manifest, hash_files, package_versions, read_manifest, statement_of, write_manifest
from ptq.quantization.assemble import copy_components, write_expert
from ptq.quantization.expert import ExpertResult, ExpertRun
from ptq.quantization.job import Job
from ptq.quantization.placing import PLACE_WORDS, Place, check_place
from ptq.quantization.plan import streams_place
from ptq.quantization.processes import Processes
from ptq.quantization.sensitivity import protect_blocks, with_protection
from ptq.quantization.workdir import RUN_FILES, WorkDir
from ptq.store.files import digest, free_space_hint
from ptq.store.lora import LoraInfo, without_paths
from ptq.store.run_directory import hold_whole
from ptq.version import __version__
from ptq.wan.card import write_card
from ptq.wan.replay import state_names


def quantize(job: Job) -> Manifest:
    """Quantize every expert of a Wan pipeline and write the packed checkpoint.

    Returns:
        The checkpoint's manifest.

    Raises:
        UsageError: `out` exists, an unfinished run of other settings, records of another model, over the block budget.
        PtqError: another process makes `out`; damaged or missing weights, NaN weights, disk full. Finished blocks are
            kept for the next try.
    """
    start = time.monotonic()
    job.check()
    job.calibration.verify()
    _ = job.signature  # damaged weights stop here, before anything is written
    job = replace(job, processes=Processes.from_environment())
    with hold_whole(job.out) if job.processes.first else contextlib.nullcontext():
        return _quantize(job, start)


def _quantize(job: Job, start: float) -> Manifest:
    processes = job.processes
    late = job.options.fresh and not processes.first
    if late:
        processes.wait()  # the first one throws an earlier run away
    work = WorkDir(job.out, job.signature)
    work.begin(fresh=job.options.fresh and processes.first)
    if not late:
        processes.wait()
    if not work.is_complete:
        chosen, results = job, _run_experts(job, work)
        if job.settings.auto_protect:
            if processes.first:
                protect_blocks(job, work)
            processes.wait()
            chosen = replace(job, settings=with_protection(job.settings, work, list(job.layout.experts)))
            results = _run_experts(chosen, work)
        if processes.first:
            work.remove_leftovers()
            copy_components(job.layout, work.path, job.recorded_preset, link=job.options.link)
            manifest = _manifest(chosen, job.signature, results, time.monotonic() - start)
            manifest = manifest.model_copy(update={"files": hash_files(work.path, exclude=RUN_FILES)})
            write_card(work.path, manifest)
            write_manifest(work.path, manifest)
    processes.wait()
    if processes.first:
        work.finish()
    processes.wait()
    return read_manifest(job.out)


def _run_experts(job: Job, work: WorkDir) -> list[ExpertResult]:
    """Quantize (or replay finished) blocks of every expert and write its shards into the work directory."""
    layout = job.layout
    results: list[ExpertResult] = []
    passes = 2 if job.settings.recipe.solver.residual else 1  # codes first, then the streams with residual blocks
    with ui.progress("Quantizing blocks", passes * sum(map(layout.num_blocks, layout.experts))) as bar:
        for expert, config in layout.experts.items():
            result = ExpertRun(job, expert, work, place_streams(job, expert, work.path)).run(bar)
            results.append(result)
            if not job.processes.first:
                continue
            packed, limit = replace(job.packed(expert), residual=result.residual), job.options.max_shard_bytes
            names = state_names(config, packed)
            changed = job.merged_entries(expert, names, work.merged_file(expert)) | result.changed
            write_expert(work.path / expert, config, packed, names, job.shards[expert], changed, limit)
    return results


def place_streams(job: Job, expert: str, work: Path) -> Place:
    """Where the streams of an expert go, and says it.

    Raises:
        PtqError: to the disk, which has no room.
    """
    need = job.stream_bytes(expert)
    place = streams_place(job, need)
    what = f"Hidden states of {job.used_records(expert)} records of {expert}"
    check_place(place, need, psutil.disk_usage(str(work)).free, what, free_space_hint(work))
    ui.info(f"{what}: {ui.format_bytes(need)}, {PLACE_WORDS[place]}.")
    return place


def _dumped(loras: dict[str, LoraInfo]) -> dict[str, Any]:
    return {expert: one.as_json() for expert, one in without_paths(loras).items()}


def _manifest(job: Job, signature: dict[str, Any], results: list[ExpertResult], seconds: float) -> Manifest:
    settings, calibration = job.settings, job.calibration
    coverage = job.coverage({result.summary.expert: result.residual or {} for result in results})
    return Manifest(
        package_version=__version__,
        versions=package_versions(),
        format=settings.format,
        variant=job.layout.preset.variant,
        base_model=signature["model"],
        recipe_name=settings.recipe_name,
        recipe=settings.recipe,
        calibration={
            "digest": calibration.digest,
            "prompts": calibration.info.prompts,
            "samples": [sample.as_json() for sample in calibration.info.samples],
            "records": len(calibration.records),
            "settings": job.recorded_preset.sampling(),
            "defaults": job.layout.preset.sampling(),
            **({"lora": _dumped(job.loras)} if job.loras else {}),
        },
        high_precision=[f"{name}:{index}" for name, blocks in settings.high_precision.items() for index in blocks],
        budget_scope=settings.budget_scope,
        coverage=coverage,
        experts=[result.summary for result in results],
        blocks=[row for result in results for row in result.blocks],
        layers=[row for result in results for row in result.layers],
        signature=digest(signature),
        seconds=round(seconds, 3),
        statement=statement_of(coverage.residual_share),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        files={},
    )
