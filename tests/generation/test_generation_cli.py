"""`ptq generate` and `ptq status` as a user types them, on a random-weight pipeline."""

import hashlib
import json
from pathlib import Path

import pytest
from generation_helpers import file_digests, lines
from random_model import make_random_pipeline
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import PtqError, UsageError
from ptq.prompts import unit_seed

SMALL = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "2", "--device", "cpu"]


def ptq(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, PtqError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_a_prompt_file_from_plan_to_status(pipe_dir: Path, tmp_path: Path):
    prompts = tmp_path / "two.txt"
    prompts.write_text("a red ball\na blue cube\na third that is not asked for")
    command = [
        "generate",
        pipe_dir,
        "--prompts",
        prompts,
        "--num-prompts",
        2,
        "--out",
        tmp_path / "run",
        *SMALL,
        "--json",
    ]
    plan = json.loads(ptq(*command, "--dry-run", "--samples-per-prompt", 2))
    assert (plan["units"], plan["to_make"], plan["settings"]["fps"]) == (4, 4, 16)
    assert plan["weight_bytes"] > 0 and not (tmp_path / "run").exists()
    assert "units of the run" in ptq(*command[:-1], "--dry-run")
    summary = json.loads(ptq(*command, "--samples-per-prompt", 2))
    assert (summary["done"], summary["kept"], summary["remaining"]) == (4, 0, 0)
    again = json.loads(ptq(*command, "--samples-per-prompt", 2))
    assert (again["done"], again["kept"]) == (0, 4)
    found = lines(tmp_path / "run")
    ids = [hashlib.sha1(text.encode()).hexdigest()[:12] for text in ("a red ball", "a blue cube")]
    assert [(line["sample_id"], line["k"]) for line in found] == [(i, k) for i in ids for k in (0, 1)]
    assert [line["seed"] for line in found] == [unit_seed(0, "two", i, k) for i in ids for k in (0, 1)]
    # The variant's preset fills in what the command leaves out.
    assert {(line["flow_shift"], line["guidance_scale"], line["guidance_scale_2"]) for line in found} == {
        (12.0, 4.0, 3.0)
    }
    assert json.loads((tmp_path / "run" / "run.json").read_text())["plan"]["prompts"]["format"] == "txt"
    state = json.loads(ptq("status", tmp_path / "run", "--json"))
    assert (state["units"], state["done"], state["remaining"]) == (4, 4, 0) and state["shards"][0]["units_per_hour"] > 0
    assert "4 of 4 units done, 0 failed, 0 remaining." in ptq("status", tmp_path / "run")


def test_shards_on_the_command_line_and_from_the_launcher(pipe_dir: Path, tmp_path: Path, monkeypatch):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\ntwo\nthree")
    command = ["generate", pipe_dir, "--prompts", prompts, *SMALL, "--json", "--out"]
    ptq(*command, tmp_path / "whole")
    assert json.loads(ptq(*command, tmp_path / "parts", "--shard", "0/2"))["done"] == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert json.loads(ptq(*command, tmp_path / "parts"))["done"] == 1
    assert file_digests(tmp_path / "parts") == file_digests(tmp_path / "whole")


def test_one_prompt_with_an_image(tmp_path: Path):
    import numpy as np
    from PIL import Image

    model = make_random_pipeline(tmp_path / "model", "TI2V-5B", layers=1, width=64)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    command = ["generate", model, "--prompt", "a cat", *SMALL, "--height", 64, "--width", 64, "--json", "--out"]
    ptq(*command, tmp_path / "with", "--image", tmp_path / "a.png")
    ptq(*command, tmp_path / "without")
    (one,), (two,) = lines(tmp_path / "with"), lines(tmp_path / "without")
    assert one["unit"] == two["unit"] == f"prompt/{hashlib.sha1(b'a cat').hexdigest()[:12]}/0"
    assert one["image"] == str(tmp_path / "a.png") and two["image"] is None and one["guidance_scale_2"] is None
    assert one["final_latents_sha256"] != two["final_latents_sha256"]


def test_the_exit_code_says_that_units_remain(pipe_dir: Path, tmp_path: Path, monkeypatch):
    def refuse(*_: object) -> bytes:
        raise RuntimeError("no encoder here")

    monkeypatch.setattr("ptq.generation.worker.encode_video", refuse)
    command = ["generate", pipe_dir, "--prompt", "a cat", *SMALL, "--out", tmp_path / "run"]
    assert json.loads(ptq(*command, "--json", code=1))["remaining"] == 1
    assert "failed: prompt/" in ptq("status", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "either --prompt TEXT or --prompts FILE"),
        (["--prompt", "a", "--prompts", "b.txt"], "either --prompt TEXT or --prompts FILE"),
        (["--prompt", " "], "empty"),
        (["--prompt", "a", "--image", "x.png"], "text-to-video"),
        (["--prompt", "a", "--shard", "2/2"], "count from 0"),
        (["--prompt", "a", "--dtype", "int4"], "--dtype"),
        (["--prompt", "a", "--height", "40"], "multiple of 16"),
        (["--prompts", "missing.txt"], "does not exist"),
    ],
)
def test_bad_requests_are_explained(pipe_dir: Path, tmp_path: Path, arguments: list[str], text: str):
    with pytest.raises(PtqError, match=text) as caught:
        ptq("generate", pipe_dir, "--out", tmp_path / "run", "--device", "cpu", *arguments)
    assert isinstance(caught.value, UsageError) or "does not exist" in text
    assert not list(tmp_path.rglob("*.mp4"))
