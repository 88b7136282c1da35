"""`ptq evaluate` on the command line: what is printed, exit codes, one paragraph for errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from evaluation_runs import make_run, tiny_clips
from typer.testing import CliRunner

from ptq import ui
from ptq.cli.main import app
from ptq.errors import PtqError, UsageError
from ptq.report.cells import percent, plain
from ptq.store.evaluation import Estimate
from ptq.store.files import read_json

runner = CliRunner()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    clips, prompts = tiny_clips(12)
    names = list(clips)
    shuffled = {name: clips[names[i - 5]] for i, name in enumerate(names)}
    return [
        str(make_run(folder / "ref", clips, prompts=prompts)),
        str(make_run(folder / "cand", shuffled, prompts=prompts, info={"checkpoint": {"format": "mxfp4"}})),
    ]


def evaluate(runs, *options):
    return runner.invoke(app, ["evaluate", "--reference", runs[0], "--candidate", runs[1], *options])


def test_verdict_comes_first_and_the_numbers_are_those_of_the_file(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(ui.console, "width", 120)
    result = evaluate(runs, "--out", str(tmp_path / "out"), "--suite", "tiny")
    content = read_json(tmp_path / "out" / "evaluation.json")
    assert result.exit_code == 0 and result.stdout.startswith("FAIL  mean signed relative loss")
    assert content["verdict"] == "FAIL" and "limit 1.0 % (mxfp4)" in result.stdout
    for name, value in content["dimensions"].items():
        words = f" {name.replace('_', ' ')} "
        row = next(line for line in result.stdout.splitlines() if words in line)
        assert percent(Estimate(**value["relative_loss"])).text in row
    assert "Only 12 prompts" in result.stderr and "never decide the verdict" in result.stderr


def test_tables_fit_a_narrow_terminal(runs, tmp_path):
    result = evaluate(runs, "--out", str(tmp_path / "out"), "--suite", "tiny")
    lines = result.stdout.splitlines()[1:]
    assert max(map(len, lines)) <= 80
    drift = next(line for line in lines if "SSIM" in line)
    values = read_json(tmp_path / "out" / "evaluation.json")["paired"]["ssim"]
    assert all(plain(values[key]) in drift for key in ("mean", "min", "max"))


def test_json_is_the_file(runs, tmp_path):
    result = evaluate(runs, "--out", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == read_json(tmp_path / "out" / "evaluation.json")


def test_dry_run_writes_nothing(runs, tmp_path):
    result = evaluate(runs, "--dry-run", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0 and "12 pairs, 0 units left out" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--out"), (["--vbench-root", "/x", "--out", "/tmp/x"], "--vbench-root needs"),
        (["--suite", "icme2026", "--out", "/tmp/x"], "--import-vbench REF CAND or --vbench-python"),
        (["--vbench-python", "python3", "--out", "/tmp/x"], "does not use VBench"),
    ],
)  # fmt: skip
def test_unclear_requests_are_usage_errors(runs, options, message):
    result = evaluate(runs, *options)
    assert isinstance(result.exception, UsageError) and message in str(result.exception)


def test_imports_need_the_format(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    files = ["--import-vbench", str(tmp_path / "r.json"), str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]
    result = runner.invoke(app, ["evaluate", *files])
    assert isinstance(result.exception, UsageError) and "--format" in str(result.exception)
    assert isinstance(runner.invoke(app, ["evaluate", *files, "--format", "hif4"]).exception, PtqError)
    assert isinstance(runner.invoke(app, ["evaluate"]).exception, UsageError)


def test_errors_are_one_paragraph_without_traceback(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ptq.cli.main",
        "evaluate",
        "--reference",
        str(tmp_path),
        "--candidate",
        str(tmp_path),
    ]
    result = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"Comparing .*\nError: .*is not a generation directory.*\n", result.stderr)


def test_weights_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    (tmp_path / "amt_model").mkdir()
    (tmp_path / "amt_model" / "amt-s.pth").touch()
    result = runner.invoke(app, ["evaluate", "--vbench-check", "--suite", "icme2026", "--json"])
    weights = {row["path"]: row["present"] for row in json.loads(result.stdout)["weights"]}
    assert [path for path, present in weights.items() if present] == [str(tmp_path / "amt_model" / "amt-s.pth")]
    assert len(weights) == 9
    shown = runner.invoke(app, ["evaluate", "--vbench-check", "--suite", "icme2026"])
    assert f"motion_smoothness: {tmp_path}/amt_model/amt-s.pth present" in shown.stdout


def test_help_needs_no_heavy_imports():
    code = (
        "import sys; from typer.testing import CliRunner; from ptq.cli.main import app\n"
        "assert CliRunner().invoke(app, ['evaluate', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'av', 'scipy', 'skimage', 'numpy', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
