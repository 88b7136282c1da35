"""The commands of README and guide run as they stand, in their order, on small models under the names that they use."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import loras
import pytest
from random_model import make_random_pipeline
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.evaluation.suites import get_suite
from ptq.store.files import read_json, write_json
from ptq.wan.loading import load_pipeline

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
PROGRAMS = r"(?:ptq|python3?|pytest|make|git|torchrun|accelerate|sbatch|\.venv/bin/\w+) "
NOT_RUN = {
    "ptq generate ... --shard": "dots stand for another command: tests/generation/test_generation_shards.py",
    "ptq evaluate --suite vbench": "needs VBench: tests/evaluation/test_evaluation_vbench_run.py has a stand-in",
    "ptq evaluate --reference runs/original --candidate runs/hif4 --suite icme2026": "the same",
    "ptq evaluate --reference runs/t2v --candidate runs/t2v-hif4 --suite icme2026": "the same",
    "ptq report evaluation\n": "of that evaluation; the other report of the guide is run",
    "ptq generate i2v-hif4 ": "of true size: tests/evaluation/test_evaluation_guide.py",
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


def small(path: Path, variant: str) -> None:
    """A random pipeline of one block an expert, whose own defaults are a few steps of a few pixels."""
    make_random_pipeline(path, variant, layers=1, width=64)
    preset = read_json(path / "ptq_preset.json")
    write_json(path / "ptq_preset.json", {**preset, "height": 32, "width": 32, "num_frames": 5, "steps": 4})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: models, prompts, clips, LoRAs, results of VBench."""
    folder = tmp_path_factory.mktemp("shown")
    small(folder / "Wan-AI" / "Wan2.2-T2V-A14B-Diffusers", "T2V-A14B")
    (folder / "MODEL").symlink_to("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    (folder / "clips").mkdir()
    captions = [{"path": f"{i}.mp4", "cap": [f"a red ball number {i}"]} for i in range(32)]
    (folder / "OpenS2V-5M_to_mm.json").write_text(json.dumps(captions))
    shutil.copy(folder / "OpenS2V-5M_to_mm.json", folder / "prompts.json")
    (folder / "eval.json").write_text(
        json.dumps([{"id": f"e{i}", "prompt": f"a blue cube number {i}"} for i in range(2)])
    )
    pipeline = load_pipeline(folder / "MODEL")
    for name, expert in (("high", pipeline.transformer), ("low", pipeline.transformer_2)):
        pairs = loras.factors(loras.block_linears(expert), std=0.05)
        loras.write(folder / f"{name}_noise_model.safetensors", loras.original_names(pairs))
    rows = [{"video_path": f"e{i}-{k}.mp4", "video_results": 0.5} for i in range(2) for k in range(5)]
    for name in ("original", "hif4"):
        results = {dimension: [0.5, rows] for dimension in get_suite("icme2026").gate}
        (folder / f"{name}_eval_results.json").write_text(json.dumps(results))
    return folder


def chains() -> dict[str, list[str]]:
    """Commands that go on with each other's results: those of the README, of the guide's first view, of the whole guide."""
    readme, guide = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/guide.md"))
    view, _, sections = guide.partition("\n## ")
    return {
        name: list(filter(is_run, shown(text)))
        for name, text in (("readme", readme), ("view", view), ("guide", sections))
    }


@pytest.mark.slow
@pytest.mark.parametrize("chain", chains())
def test_commands_run_as_they_are_shown(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain: str
) -> None:
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for line in chains()[chain]:
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"`{line}`: {result.output[-2000:]} {result.exception}"


def test_every_command_is_run_or_said_not_to_be() -> None:
    run = {line for lines in chains().values() for line in lines}
    found = [line for name in DOCUMENTS for line in shown((ROOT / name).read_text(encoding="utf-8"))]
    assert len(run) > 15 and [line for line in found if is_run(line) and line not in run] == []
    for beginning, reason in NOT_RUN.items():
        assert any(f"{line}\n".startswith(beginning) for line in found), f"no document shows {beginning}"
        for path in re.findall(r"(?:tests|docs|\.github)/[\w./]+\w", reason):
            assert (ROOT / path).is_file(), path
