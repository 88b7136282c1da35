"""The commands of the guide's section on comparable scores, with the smallest videos."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from evaluation_runs import make_run, moving_noise
from shown import text_of
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.store.files import read_json

SMALL = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "1", "--device", "cpu"]


def line_with(word: str) -> str:
    """The one command of the section that has this word."""
    section = text_of("docs/guide.md").partition("### Scores that others can compare")[2].partition("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("ptq ") and word in line]
    return line


@pytest.mark.parametrize(
    ("word", "out", "settings"),
    [
        ("--preset icme2026", "runs/icme-hif4", {"fps": 16, "image_to_video": True}),
        ("--preset mlperf-t2v", "runs/mlperf-hif4", {"fps": 16, "guidance_scale": 4.0, "seed": 42, "seed_scheme": "same"}),
        ("--seed-scheme vbench", "runs/vbench-hif4", {"seed_scheme": "vbench"}),
    ],
)  # fmt: skip
def test_generating(here: Path, word: str, out: str, settings: dict[str, object]) -> None:
    (here / "t2v-hif4").symlink_to(here / "MODEL")
    options = shlex.split(line_with(word))[1:]
    result = CliRunner().invoke(app, [*options, *SMALL], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = read_json(here / out / "run.json")["settings"]
    assert settings.items() <= found.items()
    assert ("fixed_latent" in found) == ("--fixed-latent" in options)


@pytest.mark.parametrize("word", ["--yardstick", "--allow-overlap"])
def test_evaluating(here: Path, word: str) -> None:
    command = shlex.split(line_with(word))[1:]
    clips = {f"d/{i}/0": moving_noise(3, 32, 32, seed=i) for i in range(3)}
    for place in re.findall(r"runs/[\w-]+", " ".join(command)):
        make_run(here / place, clips)
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = read_json(here / command[command.index("--out") + 1] / "evaluation.json")
    assert content["units"] == 3 and ("yardstick" in content) == (word == "--yardstick")
    if word == "--yardstick":
        assert "Beside a yardstick: synthetic" in result.stdout
