"""scripts/compare_checkouts.py: it notices what it must notice, and its jobs say what this package understands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ptq.config import load_recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from comparison.differences import compare_directories  # noqa: E402
from comparison.jobs import all_jobs, chosen_jobs, spell  # noqa: E402

MANIFEST = {
    "seconds": 3.5,
    "blocks": [{"block": 0, "stream_error": 0.25, "seconds": 1.5}],
    "recipe": {"solver": {"damping": 0.03}},
}
RUN = {"digest": "a", "checkpoint": {"digest": "b"}, "versions": {"ptq": "0.1.0"}}


@pytest.fixture
def sides(tmp_path):
    """Two equal results, one of each kind of file."""
    for side in ("before", "after"):
        directory = tmp_path / side
        (directory / "state").mkdir(parents=True)
        (directory / "ptq_manifest.json").write_text(json.dumps(MANIFEST))
        (directory / "run.json").write_text(json.dumps(RUN))
        (directory / "config.json").write_text('{"a": 1}')
        (directory / "manifest-0of1.jsonl").write_text('{"unit": "x", "seconds": 1}\n{"unit": "y", "seconds": 2}\n')
        save_file({"codes": torch.arange(64, dtype=torch.uint8), "bias": torch.zeros(4)}, directory / "w.safetensors")
        (directory / "videos.mp4").write_bytes(b"video")
    return tmp_path / "before", tmp_path / "after"


def test_equal_results_are_equal(sides):
    assert compare_directories(*sides) == (6, 0, None)


def test_times_versions_and_locks_may_differ(sides):
    before, after = sides
    changed = {
        **MANIFEST,
        "seconds": 9,
        "blocks": [{**MANIFEST["blocks"][0], "seconds": 7}],
        "recipe": {"rotation": 64},
    }
    (after / "ptq_manifest.json").write_text(json.dumps(changed, indent=1))
    (after / "run.json").write_text(json.dumps({**RUN, "digest": "c", "versions": {"ptq": "0.2.0"}}))
    (after / "manifest-0of1.jsonl").write_text('{"unit": "x", "seconds": 5}\n{"unit": "y", "seconds": 2}\n')
    (after / "state/shard-0of1.lock").touch()
    assert compare_directories(before, after) == (6, 3, None)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("config.json", '{"a":1}', "config.json: the same values in other bytes"),
        ("config.json", '{"a": 2}', "config.json: a was 1, is 2"),
        ("config.json", '{"a": 1, "b": []}', "config.json: b was nothing, is []"),
        ("run.json", json.dumps({**RUN, "checkpoint": {"digest": "x"}}), 'run.json: checkpoint.digest was "b", is "x"'),
        ("videos.mp4", "vIdeo", "videos.mp4: other bytes"),
        ("new.json", "{}", "new.json is only after"),
    ],
)
def test_a_changed_file_is_named(sides, file, text, expected):
    (sides[1] / file).write_text(text)
    assert compare_directories(*sides)[2] == expected


def test_a_changed_error_of_a_block_is_named(sides):
    changed = {**MANIFEST, "blocks": [{**MANIFEST["blocks"][0], "stream_error": 0.26}]}
    (sides[1] / "ptq_manifest.json").write_text(json.dumps(changed))
    assert compare_directories(*sides)[2] == "ptq_manifest.json: blocks.0.stream_error was 0.25, is 0.26"


def test_a_changed_byte_of_a_tensor_is_named(sides):
    codes = torch.arange(64, dtype=torch.uint8)
    codes[5] ^= 1
    save_file({"codes": codes, "bias": torch.zeros(4)}, sides[1] / "w.safetensors")
    assert "codes was U8 [64], is U8 [64], 1 of 64 bytes differ" in str(compare_directories(*sides)[2])


def test_results_that_are_not_there_are_not_equal(tmp_path):
    assert compare_directories(tmp_path / "a", tmp_path / "b")[2] == "no files"


def test_every_job_asks_for_a_recipe_of_today():
    jobs = [job for job in all_jobs() if job.recipe is not None]
    assert len(jobs) > 40
    for job in jobs:
        words = job.arguments(flat=False)
        fmt = words[1] if words[0] == "module" else words[words.index("--format") + 1]
        name = words[words.index("--recipe") + 1] if "--recipe" in words else fmt
        overrides = tuple(text for flag, text in pairwise(words) if flag == "--set")
        assert load_recipe(name, fmt, overrides) != (None if not job.recipe else load_recipe(name, fmt)), job.name


def test_recipes_are_spelled_for_the_first_version():
    today = {"scheme.transform": "smoothed", "scheme.block": 0, "solver.smoothing": [0.5], "solver.damping": 0.1}
    first = {"learned_transform": False, "rotation": 0, "smoothing": [0.5], "gptq.damping": 0.1}
    assert spell(today, flat=False) == today
    assert spell(today, flat=True) == {"records.weighting": "uniform", **first}


def test_a_chosen_job_brings_what_it_needs():
    assert [job.name for job in chosen_jobs(["evaluate/hif4-tiny"])] == [
        *("calibrate/tiny", "generate/original", "quantize/tiny-hif4", "generate/hif4", "evaluate/hif4-tiny")
    ]


@pytest.mark.slow
def test_a_changed_recipe_is_noticed_and_results_are_used_again(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "ptq", other / "ptq", ignore=shutil.ignore_patterns("assets"))
    recipe = other / "ptq/configs/recipes/hif4.yaml"

    def compare() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "scripts/compare_checkouts.py", ROOT, other, "--out", tmp_path / "out"]
        return subprocess.run([*command, "--jobs", "module/hif4-none"], capture_output=True, text=True)

    recipe.write_text(recipe.read_text().replace("gptq", "rtn"))
    changed = compare()
    assert changed.returncode == 1, changed.stderr
    assert "outputs.safetensors: output.0 was F32 [2, 48, 144]" in changed.stdout, changed.stdout
    assert "(and 2 other files)" in changed.stdout and "1 jobs differ" in changed.stdout
    shutil.copy(ROOT / "ptq/configs/recipes/hif4.yaml", recipe)
    again = compare()
    assert again.returncode == 0 and "everything is equal" in again.stdout, again.stdout + again.stderr
    assert "before: 1 jobs are there already, 0 to run" in again.stdout
    (row,) = json.loads((tmp_path / "out/summary.json").read_text())["jobs"]
    assert row["job"] == "module/hif4-none" and row["difference"] is None and row["files"] == 3
