"""Random models, records, settings and child processes for the tests of ptq.quantization."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ptq.calibration.run import CalibrationPlan, calibrate
from ptq.checkpoint.manifest import Manifest, read_manifest
from ptq.config import load_recipe
from ptq.prompts import Sample
from ptq.quantization import calls
from ptq.quantization.job import Job, QuantizeOptions
from ptq.quantization.run import quantize
from ptq.quantization.settings import QuantizeSettings
from ptq.store.calibration import CalibrationSet
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline

SIZE = {"height": 32, "width": 32, "num_frames": 9, "steps": 6, "max_sequence_length": 16}
ALL_TOKENS = "records.tokens_per_record=100000"
GPTQ = ("solver.rounding=gptq", "solver.clip_search=true")
LEARNED = (*GPTQ, "scheme.transform=learned", "scheme.block=64")
FULL = (*GPTQ, "scheme.transform=smoothed", "scheme.block=32", "solver.smoothing=[0.5]")


def make_records(model: Path, out: Path, prompts: int = 3, records: int = 4, **preset: Any) -> CalibrationSet:
    layout = read_layout(model)
    samples = [Sample("prompts", f"p{i}", f"a red ball number {i}", f"ball {i}") for i in range(prompts)]
    preset = layout.preset.model_copy(update=SIZE | preset)
    plan = CalibrationPlan(layout, preset, samples, records, 0, {"name": "p.txt", "sha256": "0" * 64})
    calibrate(plan, lambda: load_pipeline(model, dtype=torch.float32), out)
    return CalibrationSet(out)


def make_settings(format_name: str = "mxfp4", *overrides: str, protected: dict | None = None, **options: Any):
    """The rtn recipe with `overrides`; `protected` is expert -> block -> reason."""
    return QuantizeSettings(format_name, load_recipe("rtn", format_name, overrides), "rtn", protected or {}, **options)


def shipped(recipe: str, *overrides: str) -> QuantizeSettings:
    """A recipe of the package, as it is or with `overrides`."""
    format_name = recipe.removesuffix("-fast")
    return QuantizeSettings(format_name, load_recipe(recipe, format_name, overrides), recipe, {})


def run(model: Path, records: Path, out: Path, settings: QuantizeSettings, **options: Any) -> Manifest:
    torch.set_num_threads(1)
    return quantize(Job(read_layout(model), CalibrationSet(records), settings, out, QuantizeOptions(**options)))


def run_and_die(renames: int, *arguments: Any, **options: Any) -> None:
    """Quantize, and SIGKILL this process in the middle of the n-th atomic write from now on."""
    original, left = os.replace, [renames]

    def replace(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    os.replace = replace
    run(*arguments, **options)


def run_in_small_batches(target: Any, *arguments: Any) -> None:
    """Call `target` in a process that replays three records of `make_records` at a time."""
    calls.BATCH_TOKENS = 100
    target(*arguments)


def run_with_small_files(limit: int, *arguments: Any) -> None:
    """Quantize where no file may grow past `limit` bytes; exit code 7 for the expected error."""
    from ptq.errors import PtqError

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(*arguments)
    except PtqError as error:
        os._exit(7 if "File too large" in str(error) and "run the same command again" in str(error) else 8)


def file_digests(directory: Path) -> dict[str, str]:
    """sha256 of every file but the manifest, which holds times."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "ptq_manifest.json")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def manifest_facts(directory: Path) -> dict[str, Any]:
    """The manifest without what differs from run to run: wall time and memory."""
    facts = read_manifest(directory).model_dump()
    for key in ("seconds", "peak_memory_bytes"):
        del facts[key]
    for row in facts["blocks"]:
        del row["seconds"]
    return facts


def edit_weights(model: Path, expert: str, edit: Any) -> None:
    """Change an expert's tensors in place: `edit(tensors)` gets the name -> tensor dictionary of each file."""
    for file in (model / expert).glob("*.safetensors"):
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})
