"""Fixtures of the whole suite: small random Wan pipelines and packed checkpoints that the real stages made from them.

Session-scoped and read-only: a test that changes files works on a copy (`copy_of`). Steps and sizes are the smallest that
still reach both experts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from once import made_once

from ptq import known

os.environ["OMP_NUM_THREADS"] = "1"
"""Of torch and numpy, here and in child processes. Tiny models run faster on one thread, idle threads of numpy's products take
five times the processor time of a small evaluation, and results do not depend on the machine's core count."""

SHIPPED = list(known.FORMATS), list(known.TRANSFORMS)
"""What is known before `ptq.scheme` is imported."""
STEPS = 6
GENERATE = {
    "prompt": "a red ball",
    "negative_prompt": "bad",
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": STEPS,
    "guidance_scale": 4.0,
    "max_sequence_length": 64,
    "output_type": "latent",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first: no process is left with one when the others have nothing more to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def same_names() -> Iterator[None]:
    """What a test registers is taken back: the next module of the process, whichever that is, sees what ships."""
    yield
    names = list(known.FORMATS), list(known.TRANSFORMS)
    assert names == SHIPPED, "a test left a name registered, or ptq/known.py lacks one that ptq.scheme registers"


class RandomPipelines(dict[str, Path]):
    """Variant -> a random pipeline directory, made when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._factory = factory

    def __missing__(self, variant: str) -> Path:
        from random_model import make_random_pipeline

        def make(path: Path) -> None:
            make_random_pipeline(path, variant, max_shard_bytes=600_000)

        self[variant] = made_once(self._factory, f"pipeline-{variant}", make)
        return self[variant]


@pytest.fixture(scope="session")
def random_pipelines(tmp_path_factory: pytest.TempPathFactory) -> RandomPipelines:
    """Variant -> a random pipeline directory: 2 blocks of width 128, bf16 transformers in several shards."""
    return RandomPipelines(tmp_path_factory)


@pytest.fixture(scope="session")
def packed(random_pipelines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> packed checkpoint in many shards, made with the real calibrate and quantize stages.

    hif4: two experts (T2V-A14B), rotated and smoothed, with residual blocks. mxfp4: one expert (TI2V-5B), learned transform, block 1 kept in bf16.
    """
    wanted: dict[str, tuple[str, tuple[str, ...], dict]] = {
        "hif4": ("T2V-A14B", ("scheme.transform=smoothed", "solver.smoothing=[0.5]", "solver.residual=0.2"), {}),
        "mxfp4": (
            "TI2V-5B",
            ("scheme.transform=learned", "scheme.block=32"),
            {"transformer": {1: "kept for the test"}},
        ),
    }

    def make(root: Path) -> None:
        root.mkdir()
        prompts = "a red ball rolls over the grass\na dog runs along the beach\n"
        (root / "prompts.txt").write_text(prompts, encoding="utf-8")
        for name, (variant, overrides, protected) in wanted.items():
            _quantize(random_pipelines[variant], root, name, overrides, protected)

    root = made_once(tmp_path_factory, "packed", make)
    return {name: root / name for name in wanted}


@pytest.fixture(scope="session")
def quantize_with() -> Callable[..., Path]:
    """A function: (model, folder, format, recipe overrides, protected blocks) -> packed checkpoint."""

    def run(model: Path, root: Path, format_name: str, overrides: tuple[str, ...], protected: dict) -> Path:
        (root / "prompts.txt").write_text("a red ball rolls over the grass\na dog runs\n", encoding="utf-8")
        return _quantize(model, root, format_name, overrides, protected)

    return run


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A function that copies a checkpoint directory to a place where a test may damage it."""

    def copy(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / "copy"))

    return copy


def _quantize(model: Path, root: Path, format_name: str, overrides: tuple[str, ...], protected: dict) -> Path:
    from ptq.calibration.run import CalibrationPlan, calibrate
    from ptq.cli.common import quiet_libraries
    from ptq.config import load_recipe
    from ptq.prompts import read_prompts
    from ptq.quantization.job import Job, QuantizeOptions
    from ptq.quantization.run import quantize
    from ptq.quantization.settings import QuantizeSettings
    from ptq.store.calibration import CalibrationSet
    from ptq.wan.loading import load_pipeline, resolve_model

    quiet_libraries()
    layout = resolve_model(str(model))
    found = read_prompts(root / "prompts.txt")
    preset = layout.preset.model_copy(update={"steps": STEPS})
    prompts = {"name": found.path.name, "sha256": found.sha256}
    plan = CalibrationPlan(layout, preset, found.samples, 4, 0, prompts)
    records = root / f"{format_name}-records"
    calibrate(plan, lambda: load_pipeline(model), records)
    settings = QuantizeSettings(format_name, load_recipe("rtn", format_name, overrides), "rtn", protected)
    out = root / format_name
    quantize(Job(layout, CalibrationSet(records), settings, out, QuantizeOptions(max_shard_bytes=120_000)))
    return out


@pytest.fixture(scope="session")
def generate() -> Callable[[Any], Any]:
    """A function: pipeline -> latents [1, C, T, H, W] of one short seeded run."""
    import torch

    def run(pipeline: Any) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**GENERATE, generator=torch.Generator().manual_seed(0)).frames

    return run
