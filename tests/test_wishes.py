"""Every command of the guide's table of wishes runs, on embedded and random models."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import loras
import pytest
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import PtqError

ROOT = Path(__file__).resolve().parents[1]
GPU = " (GPU)"
CALIBRATE = "ptq calibrate MODEL --prompts prompts.txt --records-per-prompt 4 --out calibration"
RTN = "ptq quantize MODEL --calibration calibration --format mxfp4 --recipe rtn --set scheme.input_rule=even --out model-mxfp4"
RUNS = (
    "ptq generate MODEL --prompts eval.txt --out runs/original",
    "ptq generate model-hif4 --prompts eval.txt --out runs/hif4",
    "ptq evaluate --reference runs/original --candidate runs/hif4 --suite tiny --out evaluation",
)


def table() -> list[tuple[str, str]]:
    """(wish, command) of each row of the guide's table, a command for a GPU with its mark."""
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    section = text.partition("\n## Wishes\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| ([^|]+) \| `([^`]+)`(?= \|| \(GPU\) \|)", section, flags=re.MULTILINE)


def on_gpu(command: str) -> bool:
    return f"`{command}`{GPU}" in (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_pipelines) -> Path:
    """Where the commands run: prompts, adapters, a calibration, checkpoints of both formats, two runs and their evaluation."""
    from ptq.wan.loading import load_pipeline

    place = tmp_path_factory.mktemp("wishes")
    (place / "prompts.txt").write_text(
        "a small red ball moves to the right on a black background\na large blue ring moves up on a white background\n",
        encoding="utf-8",
    )
    (place / "eval.txt").write_text("a small green triangle moves down on a grey background\n", encoding="utf-8")
    pipeline = load_pipeline("tiny")
    for name, expert in (("high", pipeline.transformer), ("low", pipeline.transformer_2)):
        loras.write(
            place / f"{name}.safetensors", loras.diffusers_names(loras.factors(loras.block_linears(expert), std=0.02))
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        wanted = next(command for _, command in table() if command.startswith("ptq quantize"))
        for command in (CALIBRATE, wanted, RTN, *RUNS):
            assert run(command, random_pipelines) == 0, command
    return place


def run(command: str, random_pipelines: dict[str, Path]) -> int | str:
    """The exit code, or what the command was refused with."""
    words = [word if word != "MODEL" else "tiny" for word in shlex.split(command)]
    words = [str(random_pipelines["T2V-1.3B"]) if "Wan2.1-T2V-1.3B" in word else word for word in words]
    if words[0] == "python":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        return 0
    result = CliRunner().invoke(app, words[1:])
    return str(result.exception) if isinstance(result.exception, PtqError) else result.exit_code


CHECKS: dict[str, Callable[[Path], bool]] = {
    "ptq quantize": lambda place: "library_name: diffusers" in (place / "model-hif4" / "README.md").read_text(),
    "--preset lightning": lambda place: (
        set(read(place / "calibration-fast" / "calibration.json")["lora"]) == {"transformer", "transformer_2"}
    ),
    "--dry-run": lambda place: not (place / "runs" / "new").exists(),
    "--cache": lambda place: read(place / "runs" / "cached" / "run.json")["settings"]["cache"] == "first-block:0.05",
    "ptq report": lambda place: (
        re.search(r"PASS|FAIL|INCONCLUSIVE", (place / "model-hif4" / "README.md").read_text()) is not None
    ),
    "Wan2.1": lambda place: read(place / "calibration-wan21" / "calibration.json")["variant"] == "T2V-1.3B",
    "ptq export": lambda place: (
        read(place / "model-ct" / "transformer" / "config.json")["quantization_config"]["quant_method"]
        == "compressed-tensors"
    ),
}
"""Words of a command -> what is there after it ran."""


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", [command for _, command in table()])
def test_the_command_of_a_wish_runs(folder, random_pipelines, monkeypatch, command):
    monkeypatch.chdir(folder)
    if command.startswith("ptq quantize"):
        assert (folder / "model-hif4").is_dir()  # the fixture ran it
    else:
        result = run(command, random_pipelines)
        assert re.search("GPU|CUDA", str(result)) if on_gpu(command) else result == 0
    for words, holds in CHECKS.items():
        if words in command and not on_gpu(command):
            assert holds(folder)


def test_the_table_names_every_wish():
    assert len(table()) >= 11 and sum(on_gpu(command) for _, command in table()) >= 2
    assert all(any(words in command for _, command in table()) for words in CHECKS)
