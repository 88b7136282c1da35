"""`--seed-scheme` on the command line: the noise of every video, part of the run, counted over shards and continued runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_helpers import lines
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import PtqError, UsageError

SIZE = ["--height", "64", "--width", "64", "--num-frames", "5", "--steps", "1", "--device", "cpu", "--json"]


def generate(out: Path, prompts: Path, *options: str) -> Any:
    command = ["generate", "tiny", "--prompts", str(prompts), "--out", str(out), *SIZE, *options]
    return CliRunner().invoke(app, command, catch_exceptions=True)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball rolls to the left\na blue box rolls to the right\n")
    return path


def noise(seed: int, shape: tuple[int, ...]) -> str:
    drawn = torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))
    return hashlib.sha256(drawn.numpy().tobytes()).hexdigest()


def test_the_seeds_of_vbench(prompts: Path, tmp_path: Path):
    out = tmp_path / "run"
    for shard in ("1/2", "0/2"):  # the numbers are those of the whole run
        result = generate(out, prompts, "--seed-scheme", "vbench", "--samples-per-prompt", "2", "--shard", shard)
        assert result.exit_code == 0, result.output
    assert json.loads((out / "run.json").read_text())["settings"]["seed_scheme"] == "vbench"
    made = {(line["prompt"].split()[1], line["k"]): line for line in lines(out)}
    wanted = {("red", 0): 0, ("red", 1): 1, ("blue", 0): 100000, ("blue", 1): 100001}
    assert {key: line["seed"] for key, line in made.items()} == wanted
    (shape,) = {tuple(_latents(out, line).shape) for line in made.values()}
    assert all(line["latent_sha256"] == noise(wanted[key], shape) for key, line in made.items())
    other = generate(out, prompts)
    assert isinstance(other.exception, PtqError) and "seed_scheme was 'vbench', now" in str(other.exception)


def test_prompts_in_another_order_are_not_mixed_in(prompts: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert generate(out, prompts, "--seed-scheme", "vbench", "--num-prompts", "1").exit_code == 0
    assert generate(out, prompts, "--seed-scheme", "vbench").exit_code == 0  # more prompts: the first keeps its number
    assert [line["seed"] for line in lines(out)] == [0, 100000]
    prompts.write_text("".join(f"{line}\n" for line in reversed(prompts.read_text().splitlines())))
    found = generate(out, prompts, "--seed-scheme", "vbench").exception
    assert isinstance(found, PtqError) and "made with seed 100000, but the sample of that id now has 0" in str(found)


def test_one_seed_for_all_and_a_run_of_before(prompts: Path, tmp_path: Path):
    assert generate(tmp_path / "same", prompts, "--seed-scheme", "same", "--seed", "42").exit_code == 0
    assert [line["seed"] for line in lines(tmp_path / "same")] == [42, 42]
    assert len({line["latent_sha256"] for line in lines(tmp_path / "same")}) == 1
    assert generate(tmp_path / "plain", prompts).exit_code == 0
    assert "seed_scheme" not in json.loads((tmp_path / "plain" / "run.json").read_text())["settings"]
    again = generate(tmp_path / "plain", prompts, "--seed-scheme", "unit")
    assert again.exit_code == 0 and json.loads(again.stdout)["kept"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed-scheme", "mlperf"], "--seed-scheme takes unit, vbench, same, found 'mlperf'"),
        (["--seed-scheme", "vbench", "--seed", "1"], "Leave out --seed, found 1"),
        (["--seed-scheme", "vbench", "--samples-per-prompt", "6"], "has seeds for 5 samples"),
        (["--seed-scheme", "same", "--samples-per-prompt", "2"], "Leave out --samples-per-prompt"),
    ],
)
def test_what_a_scheme_cannot_give_is_refused(prompts: Path, tmp_path: Path, options: list[str], words: str):
    found = generate(tmp_path / "run", prompts, *options).exception
    assert isinstance(found, UsageError) and words in str(found) and not (tmp_path / "run").exists()


def _latents(out: Path, line: dict[str, Any]) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(out / line["final_latents"])["latents"]
