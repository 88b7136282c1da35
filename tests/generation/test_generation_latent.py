"""`--fixed-latent`: every video starts from the latent of the file; its digest is the run's; other files are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_helpers import lines
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.generation import start_from
from ptq.generation.prepare import resolve_settings
from ptq.wan.layout import read_layout
from ptq.wan.loading import find_model

SIZE = ["--height", "64", "--width", "64", "--num-frames", "5", "--steps", "2", "--device", "cpu", "--json"]


def generate(out: Path, prompts: Path, *options: str, model: str = "tiny") -> Any:
    command = ["generate", model, "--prompts", str(prompts), "--out", str(out), *SIZE, *options]
    return CliRunner().invoke(app, command)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball rolls to the left\na blue box rolls to the right\n")
    return path


@pytest.fixture
def shape() -> tuple[int, ...]:
    return find_model("tiny").latent_shape(64, 64, 5)


def write(path: Path, values: np.ndarray, name: str = "latents") -> Path:
    save_file({name: values}, path)
    return path


def test_the_shape_is_the_one_that_the_pipeline_asks_for(random_pipelines):
    from ptq.wan.loading import load_pipeline
    from ptq.wan.pipeline import latent_shape

    for variant in ("T2V-A14B", "TI2V-5B"):
        pipe, layout = load_pipeline(random_pipelines[variant]), read_layout(random_pipelines[variant])
        assert (1, *layout.latent_shape(64, 96, 9)) == latent_shape(pipe, 64, 96, 9)


def test_every_unit_starts_from_the_file(prompts: Path, tmp_path: Path, shape: tuple[int, ...]):
    """What a seed draws, given as a file, gives the latents of that seed."""
    assert generate(tmp_path / "seeded", prompts, "--seed-scheme", "same", "--seed", "42").exit_code == 0
    drawn = torch.randn((1, *shape), generator=torch.Generator().manual_seed(42)).numpy()
    file, digest = write(tmp_path / "noise.safetensors", drawn), hashlib.sha256(drawn.tobytes()).hexdigest()
    result = generate(tmp_path / "fixed", prompts, "--fixed-latent", str(file))
    assert result.exit_code == 0, result.output
    info = json.loads((tmp_path / "fixed" / "run.json").read_text())
    assert info["settings"]["fixed_latent"] == digest and info["plan"]["fixed_latent"] == str(file)
    assert [line["latent_sha256"] for line in lines(tmp_path / "fixed")] == [digest, digest]
    same = [[line["final_latents_sha256"] for line in lines(tmp_path / name)] for name in ("seeded", "fixed")]
    assert same[0] == same[1] and len(set(same[0])) == 2
    moved = write(tmp_path / "again.safetensors", drawn[0], "noise")  # another name and no leading dimension: the same
    again = generate(tmp_path / "fixed", prompts, "--fixed-latent", str(moved))
    assert again.exit_code == 0 and json.loads(again.stdout)["kept"] == 2
    other = write(tmp_path / "other.safetensors", drawn + 1)
    for options in ((), ("--fixed-latent", str(other))):
        found = generate(tmp_path / "fixed", prompts, *options).exception
        assert isinstance(found, PtqError) and "fixed_latent was" in str(found)


def test_the_settings_of_mlperf_in_one_word(prompts: Path, tmp_path: Path, shape: tuple[int, ...]):
    file = write(tmp_path / "noise.safetensors", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    options = "--preset", "mlperf-t2v", "--fixed-latent", str(file)
    assert generate(tmp_path / "run", prompts, *options, "--num-prompts", "1").exit_code == 0
    found = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (found["guidance_scale"], found["guidance_scale_2"], found["fps"]) == (4.0, 3.0, 16)
    assert (found["seed"], found["seed_scheme"], found["steps"]) == (42, "same", 2)
    settings = resolve_settings(find_model("tiny"), {"named": "mlperf-t2v"}, seed=7)
    assert (settings.height, settings.width, settings.num_frames, settings.steps) == (720, 1280, 81, 20)
    assert (settings.seed, settings.seed_scheme) == (7, "same")  # a single option goes before the preset
    for scheme, seed in (("same", 42), ("vbench", 0), ("unit", 0)):
        settings = resolve_settings(find_model("tiny"), {"named": "mlperf-t2v"}, seed_scheme=scheme)
        assert (settings.seed, settings.seed_scheme) == (seed, scheme)


def test_a_preset_for_another_boundary_is_said(random_pipelines, capsys):
    """The random model changes experts elsewhere; one expert has no second guidance."""
    layout = read_layout(random_pipelines["TI2V-5B"])
    size = {"height": 64, "width": 64, "num_frames": 9}
    assert resolve_settings(layout, {"named": "mlperf-t2v", **size}).guidance_scale_2 is None
    said = " ".join(capsys.readouterr().err.split())
    assert "models that change experts at 0.875; this one has one expert" in said
    resolve_settings(find_model("tiny"), {"named": "mlperf-t2v", **size})
    assert "change experts" not in capsys.readouterr().err


def _with_nan(shape: tuple[int, ...]) -> np.ndarray:
    values = np.zeros(shape, np.float32)
    values[0, 0, 0, 0] = np.nan
    return values


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda path, shape: None, UsageError, "does not exist. Give a safetensors file with one float32 tensor"),
        (lambda path, shape: path.write_bytes(b"PK\x03\x04rest"), UsageError, "is a pickle, which could run code"),
        (lambda path, shape: path.write_text("noise"), DamagedFileError, "--fixed-latent cannot be read"),
        (lambda path, shape: write(path, np.zeros(shape, np.float16)), UsageError, "F16"),
        (lambda path, shape: write(path, np.zeros((2, *shape), np.float32)), UsageError, "makes a video of this size from F32"),
        (lambda path, shape: write(path, np.zeros((*shape[:3], 9), np.float32)), UsageError, "Choose the size"),
        (lambda path, shape: save_file({"a": np.zeros(shape, np.float32), "b": np.zeros(1, np.float32)}, path), UsageError, "holds 2 tensors (a, b)"),
        (lambda path, shape: write(path, _with_nan(shape)), UsageError, "not finite (NaN or infinity)"),
    ],
)  # fmt: skip
def test_other_files_are_refused(make: Any, kind: type, words: str, prompts: Path, tmp_path: Path, shape: Any):
    file = tmp_path / "noise.safetensors"
    make(file, shape)
    found = generate(tmp_path / "run", prompts, "--fixed-latent", str(file)).exception
    assert isinstance(found, kind) and words in str(found) and "\n" not in str(found)
    assert not (tmp_path / "run").exists()


def test_a_latent_that_the_settings_do_not_name_is_refused(pipe_dir: Path, tmp_path: Path):
    from dataclasses import replace

    from generation_helpers import SETTINGS, load, make_samples, run

    from ptq.generation.sampling import Sampler

    layout = read_layout(pipe_dir)
    file = write(tmp_path / "noise.safetensors", np.zeros(layout.latent_shape(32, 32, 5), np.float32))
    settings, fixed = start_from(file, layout, SETTINGS)
    assert fixed is not None and settings.fixed_latent == fixed.digest and load_file(file)["latents"].shape[0] == 16
    for asked, given in ((SETTINGS, fixed), (settings, None)):
        with pytest.raises(UsageError, match="not the one that the settings name"):
            Sampler(load(str(pipe_dir)), asked, fixed=given)
    with pytest.raises(UsageError, match="--fixed-latent every video"):
        run(pipe_dir, tmp_path / "run", make_samples(1), replace(settings), samples_per_prompt=2, fixed=fixed)
