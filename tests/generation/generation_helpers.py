"""Small real pipelines, samples and child processes for the tests of ptq.generation."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from children import start_child

from ptq.generation import ModelIdentity, Settings, Summary, run_generation
from ptq.prompts import MediaRef, Sample
from ptq.store.sharding import Shard
from ptq.wan.loading import load_pipeline

MODEL = ModelIdentity("random", "d" * 64)
SETTINGS = Settings(
    height=32,
    width=32,
    num_frames=5,
    fps=8,
    steps=3,
    flow_shift=5.0,
    guidance_scale=3.0,
    guidance_scale_2=2.0,
    negative_prompt="blurry",
    max_sequence_length=16,
    seed=7,
)


def make_samples(count: int, image: Path | None = None) -> list[Sample]:
    media = MediaRef("image", str(image), resolved=image) if image else None
    return [Sample("world", f"s{i}", f"a red ball number {i}", f"ball {i}", media) for i in range(count)]


@cache
def load(path: str):
    torch.set_num_threads(1)
    return load_pipeline(path, dtype=torch.float32)


def run(pipe_dir: Path, out: Path, samples: list[Sample], settings: Settings = SETTINGS, **options) -> Summary:
    return run_generation(lambda: load(str(pipe_dir)), samples, settings, out, model=MODEL, **options)


def in_child(pipe_dir: Path, out: Path, samples: list[Sample], shard: Shard, options: dict) -> None:
    """Target of a child process."""
    summary = run(pipe_dir, out, samples, shard=shard, **options)
    raise SystemExit(summary.remaining)


def start_run(
    pipe_dir: Path, out: Path, samples: list[Sample], shard: Shard | None = None, **options: Any
) -> BaseProcess:
    return start_child(in_child, pipe_dir, out, samples, shard or Shard(), options)


def lines(out: Path) -> list[dict]:
    """All manifest lines of a run, read without the package."""
    return [json.loads(t) for p in sorted(out.glob("manifest-*.jsonl")) for t in p.read_text().splitlines()]


def file_digests(out: Path) -> dict[str, str]:
    """sha256 of every artifact: the files that must not depend on sharding, order or interruptions."""
    found = [p for folder in ("videos", "latents", "frames") for p in (out / folder).glob("*")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
