"""Preflight finds every problem at once, says what to do, and leaves nothing behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptq.checkpoint import shards as shards_module
from ptq.cli.main import app
from ptq.errors import PtqError, UsageError
from ptq.runtime.backends import report_once, tell_once
from ptq.wan import preflight as preflight_module
from ptq.wan import trial as trial_module
from ptq.wan.preflight import Needs, preflight
from ptq.wan.trial import run_trial

HUGE = 10**18


def test_a_good_machine_passes_and_nothing_is_left(tmp_path: Path):
    preflight(lambda: Needs(1000, 1000), tmp_path / "runs" / "out", "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_name", ["hif4", "mxfp4"])
def test_the_trial_is_short(format_name, tmp_path: Path):
    run_trial(tmp_path, format_name, "cpu")
    start = time.process_time()
    run_trial(tmp_path, format_name, "cpu")
    assert time.process_time() - start < 2.0


def test_all_problems_are_told_together(tmp_path: Path):
    with pytest.raises(PtqError) as caught:
        preflight(lambda: Needs(HUGE, HUGE), tmp_path / "out", "cpu")
    text = str(caught.value)
    assert text.startswith("2 problems found") and "will be written to" in text and "of RAM are needed" in text


def test_its_own_layers_are_not_reported(tmp_path: Path, capsys):
    """They are no part of the user's model; what a model's own layers run on is still said after it."""
    tell_once.cache_clear()
    preflight(Needs, tmp_path / "out", "cpu")
    report_once("hif4", "cpu", "for the test")
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("backend") == 1


def test_a_trial_that_passed_is_not_repeated(tmp_path: Path, monkeypatch):
    """Until the device, the format or a library is another; a note that is damaged or missing is none."""
    tried = []
    monkeypatch.setattr("ptq.wan.trial.run_trial", lambda *arguments: tried.append(arguments[1:]))
    out, state = tmp_path / "out", tmp_path / "out" / "state"
    note = state / "preflight.json"
    preflight(Needs, out, "cpu", state=state)
    preflight(Needs, out, "cpu", state=state)
    assert tried == [("hif4", "cpu")]
    preflight(Needs, out, "cpu", "mxfp4", state=state)
    assert tried.pop() == ("mxfp4", "cpu") and len(tried) == 1
    note.write_bytes(note.read_bytes()[:-9])
    preflight(Needs, out, "cpu", "mxfp4", state=state)
    assert len(tried) == 2
    monkeypatch.setattr(preflight_module, "package_versions", lambda: {"torch": "9.9"})
    preflight(Needs, out, "cpu", "mxfp4", state=state)
    assert len(tried) == 3


def test_what_a_killed_trial_left_goes_also_where_no_trial_follows(tmp_path: Path, monkeypatch):
    out, state = tmp_path / "out", tmp_path / "out" / "state"
    preflight(Needs, out, "cpu", state=state)
    code = f"import os, signal\nfrom pathlib import Path\nfrom ptq.store.files import temporary_directory\nwith temporary_directory(Path({str(tmp_path)!r}), 'ptq-preflight') as folder:\n    (folder / 'x').touch()\n    os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert {path.name for path in tmp_path.iterdir()} > {"out"}
    monkeypatch.setattr("ptq.store.files._swept", set())  # the next command is another process
    monkeypatch.setattr("ptq.wan.trial.run_trial", lambda *arguments: pytest.fail("it is noted"))
    preflight(Needs, out, "cpu", state=state)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_returns_other_bytes_is_noticed(tmp_path: Path, monkeypatch):
    def damage(directory, ordered, *arguments):
        shards_module.write_component(directory, ordered, *arguments)
        (file,) = Path(directory).glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(trial_module, "write_component", damage)
    with pytest.raises(PtqError, match="checksum"):
        preflight(Needs, tmp_path / "out", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PtqError, match=r"Could not write .*out: Not a directory"):
        run_trial(tmp_path / "file" / "out", "hif4", "cpu")


@pytest.mark.parametrize(("device", "text"), [("gpu", "cuda:<n>"), ("meta", "cuda:<n>")])
def test_unknown_devices_are_refused(tmp_path: Path, device, text):
    with pytest.raises(UsageError, match=text):
        preflight(Needs, tmp_path / "out", device)


def test_a_foreign_output_is_refused_before_the_machine_is_looked_at(
    random_pipelines, packed, tmp_path: Path, monkeypatch
):
    """By each stage; with a machine on which nothing fits, whose problems would otherwise be told first."""
    monkeypatch.setattr(preflight_module, "check_room", lambda *_: ["no room"])
    (tmp_path / "p.txt").write_text("a red ball\n")
    out = tmp_path / "out"
    (out / "videos").mkdir(parents=True)
    (out / "videos" / "mine.mp4").write_text("mine")
    model, records = random_pipelines["T2V-A14B"], packed["hif4"].with_name("hif4-records")
    tail = ["--out", str(out), "--device", "cpu"]
    for command in (
        ["calibrate", str(model), "--prompts", str(tmp_path / "p.txt"), *tail],
        ["generate", str(model), "--prompt", "a cat", *tail],
        ["quantize", str(model), "--calibration", str(records), "--format", "hif4", *tail],
    ):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, PtqError) and str(out) in str(result.exception), command
        assert "no room" not in str(result.exception)
    assert [file.name for file in out.rglob("*")] == ["videos", "mine.mp4"]


def test_dry_runs_show_estimates(random_pipelines, tmp_path: Path):
    (tmp_path / "p.txt").write_text("a red ball\na blue cube\n")
    model, records = str(random_pipelines["T2V-A14B"]), str(tmp_path / "records")
    calibrate = [
        "calibrate",
        model,
        "--prompts",
        str(tmp_path / "p.txt"),
        "--out",
        records,
        "--device",
        "cpu",
        "--steps",
        "6",
    ]
    shown = CliRunner().invoke(app, [*calibrate, "--dry-run", "--shard", "1/2"]).stdout
    for text in ("1 prompts (shard 1/2)", "disk, estimated", "RAM, estimated", "at most"):
        assert text in shown
    assert not (tmp_path / "records").exists()
    assert CliRunner().invoke(app, calibrate).exit_code == 0
    quantize = [
        "quantize",
        model,
        "--calibration",
        records,
        "--format",
        "mxfp4",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    shown = CliRunner().invoke(app, [*quantize, "--dry-run"]).stdout
    for text in ("disk while it runs", "RAM, estimated", "time, estimated", "records of"):
        assert text in shown
    assert not list(tmp_path.glob("out*"))
