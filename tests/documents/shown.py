"""The commands that documents show, in their order, and how a test runs one."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import PtqError

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = r"(?:ptq|python3?|pytest|make|git|torchrun|accelerate|sbatch|\.venv/bin/\w+) "
NOT_RUN = {
    "ptq generate ... --shard": "dots stand for another command: tests/generation/test_generation_shards.py",
    "ptq evaluate --suite vbench": "needs VBench: tests/evaluation/test_evaluation_vbench_run.py has a stand-in",
    "ptq evaluate --reference runs/original --candidate runs/hif4 --suite icme2026": "the same",
    "ptq evaluate --reference runs/t2v --candidate runs/t2v-hif4 --suite icme2026": "the same",
    "ptq report evaluation\n": "of that evaluation; the other report of the guide is run",
    "ptq generate i2v-hif4 ": "of true size: tests/documents/test_comparable_scores.py",
    "ptq generate t2v-hif4 --prompts mlperf.txt": "the same",
    "ptq generate t2v-hif4 --prompts vbench.json": "the same",
    "ptq evaluate --reference runs/t2v --candidate runs/t2v-hif4 --yardstick": "the same",
    "ptq evaluate --reference runs/t2v --candidate runs/t2v-hif4 --allow-overlap": "the same",
    "ptq export hif4-plain": "a checkpoint that the text describes: tests/checkpoint/test_checkpoint_export.py",
    "ptq package": "needs a verdict of VBench: tests/submission/test_submission_package.py",
    "ptq verify": "the same: tests/submission/test_submission_verify_archive.py",
    "ptq bench quantize": "a layer of true width: tests/runtime/test_bench_linear.py",
    "ptq calibrate wan": "a block of true width, as the rest of docs/benchmarks.md",
    "ptq quantize wan": "the same",
    "torchrun": "eight GPUs: tests/generation/test_generation_group.py",
    "sbatch": "a cluster: tests/generation/test_generation_shards.py",
    "python scripts/convert_original_wan.py": "tests/wan/test_wan_original.py",
    "python scripts/make_random_wan.py": "gigabytes: tests/wan/test_wan_layout.py",
    "python scripts/gpu_suite.py": "needs a GPU",
    "python scripts/torture.py": "minutes: tests/test_torture.py makes six tries",
    "python scripts/train_tiny.py": "hours",
    "python scripts/": "minutes to an hour",
    "pytest -m gpu": "needs a GPU",
    ".venv/bin/pytest": "what runs this",
    "make ": "what runs this, and .github/workflows/ci.yml",
    "git clone": "a network",
}
"""Beginning of a command that documents show, or a whole line -> why it is not run here, and what runs it instead."""


def text_of(name: str) -> str:
    """A document, by its path in the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def shown(text: str) -> list[str]:
    """Commands of a document's code blocks, fenced or indented, one a line and without comments."""
    blocks = [
        *re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL),
        *re.findall(r"^    \S.*$", text, flags=re.MULTILINE),
    ]
    lines = [
        " ".join(re.sub(r"\s#.*", "", line).split())
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    bare = [re.sub(r"^(?:\w+=\S+ |/usr/bin/time -v )+", "", line) for line in lines]
    return [line for line in bare if re.match(PROGRAMS, line)]


def is_run(line: str) -> bool:
    return not f"{line}\n".startswith(tuple(NOT_RUN))


def first_view() -> list[str]:
    """Commands of the guide before its first section."""
    return shown(text_of("docs/guide.md").partition("\n## ")[0])


def run(line: str) -> int | str:
    """Run a command in this process: its exit code, or what it was refused with. A program of the repository: 0, or its exception."""
    program, *words = shlex.split(line)
    if program == "python":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        return 0
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, PtqError):
        return str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code
