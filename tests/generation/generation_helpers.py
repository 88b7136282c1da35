"""Small real pipelines, samples and child processes for the tests of ptq.generation."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from functools import cache
from pathlib import Path

import torch

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


def start_child(pipe_dir: Path, out: Path, samples: list[Sample], shard: Shard | None = None, **options):
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the server that the children are forked from; it never runs a tensor operation.
    context.set_forkserver_preload(
        [
            "ptq.generation.worker",
            "random_model",
            "diffusers.pipelines.wan.pipeline_wan",
            "ptq.checkpoint.shards",
        ]
    )
    child = context.Process(target=in_child, args=(pipe_dir, out, samples, shard or Shard(), options))
    child.start()
    return child


def lines(out: Path) -> list[dict]:
    """All manifest lines of a run, read without the package."""
    return [json.loads(t) for p in sorted(out.glob("manifest-*.jsonl")) for t in p.read_text().splitlines()]


def file_digests(out: Path) -> dict[str, str]:
    """sha256 of every artifact: the files that must not depend on sharding, order or interruptions."""
    found = [p for folder in ("videos", "latents", "frames") for p in (out / folder).glob("*")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
