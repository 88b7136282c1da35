"""Every command of the guide's table of wishes runs, where the guide's first view has run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from shown import run, text_of

from ptq.store.files import read_json

GPU = " (GPU)"
BEFORE = (
    "ptq quantize MODEL --calibration calibration --format mxfp4 --recipe rtn --set scheme.input_rule=even --out model-mxfp4",
    "ptq evaluate --reference runs/original --candidate runs/hif4 --suite tiny --out evaluation",
)
"""What the commands read beside the results of the first view."""
STEPS = {"--cache": " --steps 12"}
"""Words of a command -> what is added to it: fewer steps leave nothing to skip."""


def table() -> list[tuple[str, str]]:
    """(wish, command) of each row of the guide's table, a command for a GPU with its mark."""
    section = text_of("docs/guide.md").partition("\n## Wishes\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| ([^|]+) \| `([^`]+)`(?= \|| \(GPU\) \|)", section, flags=re.MULTILINE)


def on_gpu(command: str) -> bool:
    return f"`{command}`{GPU}" in text_of("docs/guide.md")


@pytest.fixture(scope="module")
def folder(viewed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Path(shutil.copytree(viewed, tmp_path_factory.mktemp("wishes") / "place", symlinks=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for command in BEFORE:
            assert run(command) == 0, command
    return place


CHECKS: dict[str, Callable[[Path], bool]] = {
    "ptq quantize": lambda place: "library_name: diffusers" in (place / "model-hif4" / "README.md").read_text(),
    "--preset lightning": lambda place: (
        set(read_json(place / "calibration-fast" / "calibration.json")["lora"]) == {"transformer", "transformer_2"}
    ),
    "--dry-run": lambda place: not (place / "runs" / "new").exists(),
    "--cache": lambda place: (
        read_json(place / "runs" / "cached" / "run.json")["settings"]["cache"] == "first-block:0.05"
    ),
    "ptq report": lambda place: (
        re.search(r"PASS|FAIL|INCONCLUSIVE", (place / "model-hif4" / "README.md").read_text()) is not None
    ),
    "Wan2.1": lambda place: read_json(place / "calibration-wan21" / "calibration.json")["variant"] == "T2V-1.3B",
    "ptq export": lambda place: (
        read_json(place / "model-ct" / "transformer" / "config.json")["quantization_config"]["quant_method"]
        == "compressed-tensors"
    ),
}
"""Words of a command -> what is there after it ran."""


@pytest.mark.parametrize("command", [command for _, command in table()])
def test_the_command_of_a_wish_runs(folder, monkeypatch, command):
    monkeypatch.chdir(folder)
    if command.startswith("ptq quantize"):
        assert (folder / "model-hif4").is_dir()  # the first view ran it
    else:
        result = run(command + next((more for words, more in STEPS.items() if words in command), ""))
        assert re.search("GPU|CUDA", str(result)) if on_gpu(command) else result == 0, result
    for words, holds in CHECKS.items():
        if words in command and not on_gpu(command):
            assert holds(folder)


def test_the_table_names_every_wish():
    assert len(table()) >= 11 and sum(on_gpu(command) for _, command in table()) >= 2
    assert all(any(words in command for _, command in table()) for words in CHECKS)
