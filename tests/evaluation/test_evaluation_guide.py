"""The commands of the guide's section on comparable scores, run on embedded models with the smallest videos."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import make_run, moving_noise
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.store.files import read_json
from ptq.wan.loading import find_model

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"
SMALL = ["--height", "64", "--width", "64", "--num-frames", "5", "--steps", "1", "--device", "cpu"]
MODELS = {"i2v-hif4": "tiny-i2v", "t2v-hif4": "tiny"}


def shown(word: str) -> str:
    """The one line of the section that has this word."""
    section = GUIDE.read_text(encoding="utf-8").partition("### Scores that others can compare")[2].partition("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("ptq ") and word in line]
    return line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the commands name."""
    monkeypatch.chdir(tmp_path)
    texts = ["a red ball rolls to the left", "a blue box rolls to the right"]
    for name in ("mlperf.txt", "vbench.json"):
        lines = [f'{{"prompt_en": "{text}", "dimension": ["scene"]}}' for text in texts]
        Path(name).write_text(f"[{', '.join(lines)}]" if name.endswith("json") else "\n".join(texts))
    Image.fromarray(moving_noise(1, 64, 64)[0]).save("ball.png")
    Path("eval.json").write_text('[{"id": "ball", "prompt": "a red ball rolls to the left", "image": "ball.png"}]')
    noise = np.random.default_rng(0).normal(size=find_model("tiny").latent_shape(64, 64, 5))
    save_file({"latents": noise.astype(np.float32)}, "noise.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("word", "out", "settings"),
    [
        ("--preset icme2026", "runs/icme-hif4", {"fps": 16, "image_to_video": True}),
        ("--preset mlperf-t2v", "runs/mlperf-hif4", {"fps": 16, "guidance_scale": 4.0, "seed": 42, "seed_scheme": "same"}),
        ("--seed-scheme vbench", "runs/vbench-hif4", {"seed_scheme": "vbench"}),
    ],
)  # fmt: skip
def test_generating(here: Path, word: str, out: str, settings: dict[str, object]) -> None:
    name, model, *options = shlex.split(shown(word))[1:]
    options = [
        "1" if before == "--samples-per-prompt" else one for before, one in zip(["", *options], options, strict=False)
    ]
    result = CliRunner().invoke(app, [name, MODELS[model], *options, *SMALL], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = read_json(here / out / "run.json")["settings"]
    assert settings.items() <= found.items()
    assert ("fixed_latent" in found) == ("--fixed-latent" in options)


@pytest.mark.parametrize("word", ["--yardstick", "--allow-overlap"])
def test_evaluating(here: Path, word: str) -> None:
    command = shlex.split(shown(word))[1:]
    clips = {f"d/{i}/0": moving_noise(3, 32, 32, seed=i) for i in range(3)}
    for place in re.findall(r"runs/[\w-]+", " ".join(command)):
        make_run(here / place, clips)
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = read_json(here / command[command.index("--out") + 1] / "evaluation.json")
    assert content["units"] == 3 and ("yardstick" in content) == (word == "--yardstick")
    if word == "--yardstick":
        assert "Beside a yardstick: synthetic" in result.stdout
