"""Random pipelines, plans and child processes for the tests of ptq.calibration."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

from ptq.calibration.run import CalibrationPlan, calibrate
from ptq.prompts import MediaRef, Sample
from ptq.store.sharding import Shard
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline

SIZE = {"height": 32, "width": 32, "num_frames": 5, "steps": 6, "max_sequence_length": 16}


@cache
def load(path: str):
    torch.set_num_threads(1)
    return load_pipeline(path, dtype=torch.float32)


def samples(count: int, image: Path | None = None) -> list[Sample]:
    media = MediaRef("image", str(image), resolved=image) if image else None
    return [Sample("prompts", f"p{i}", f"a red ball number {i}", f"ball {i}", media) for i in range(count)]


def make_plan(
    pipe_dir: Path, count: int = 4, *, records: int = 4, seed: int = 0, image: Path | None = None, **preset
) -> CalibrationPlan:
    layout = read_layout(pipe_dir)
    preset = layout.preset.model_copy(update=SIZE | preset)
    return CalibrationPlan(layout, preset, samples(count, image), records, seed, {"name": "p.txt", "sha256": "0" * 64})


def record(pipe_dir: Path, out: Path, count: int = 4, *, shard: tuple[int, int] = (0, 1), **options) -> dict:
    return calibrate(make_plan(pipe_dir, count, **options), lambda: load(str(pipe_dir)), out, shard=Shard(*shard))


def file_digests(out: Path) -> dict[str, str]:
    """sha256 of every file of a calibration directory, locks apart."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.parent.name != "state")
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
