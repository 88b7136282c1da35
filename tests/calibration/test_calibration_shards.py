"""Several processes on one calibration directory: the same bytes as one process, and no two on the same part."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from calibration_helpers import file_digests, load, make_plan, record
from children import start_child
from PIL import Image
from typer.testing import CliRunner

from ptq.calibration.directory import read_status
from ptq.calibration.run import calibrate
from ptq.cli.main import app
from ptq.errors import PtqError, UsageError
from ptq.store.calibration import CalibrationSet
from ptq.store.locks import shard_lock
from ptq.store.run_directory import STATE_DIR
from ptq.store.sharding import Shard


def never():
    raise AssertionError("the model was loaded although nothing was left to record")


@pytest.mark.parametrize("count", [2, 3])
def test_processes_at_once_give_the_records_of_one(t2v, whole, tmp_path, count):
    out = tmp_path / "records"
    children = [start_child(record, t2v, out, 5, shard=(index, count)) for index in range(count)]
    for child in children:
        child.join(240)
        assert child.exitcode == 0
    assert CalibrationSet(out).info.complete
    assert file_digests(out) == file_digests(whole)


def test_the_launcher_decides_the_shard(t2v, tmp_path, monkeypatch):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\ntwo\nthree\n")
    size = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "6", "--records-per-prompt", "4"]
    command = ["calibrate", str(t2v), "--prompts", str(prompts), *size, "--device", "cpu", "--out"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "whole")]).exit_code == 0
    parts = tmp_path / "parts"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(app, [*command, str(parts)]).exit_code == 0
    assert [path.name for path in (parts / "records").iterdir()] == ["00001.safetensors"]
    state = json.loads(CliRunner().invoke(app, ["status", str(parts), "--json"]).stdout)
    assert (state["prompts"], state["done"], state["complete"], state["running"]) == (3, 1, False, [])
    monkeypatch.setenv("RANK", "0")
    assert CliRunner().invoke(app, [*command, str(parts)]).exit_code == 0
    assert file_digests(parts) == file_digests(tmp_path / "whole")
    assert "records of 3 of 3 prompts, complete" in CliRunner().invoke(app, ["status", str(parts)]).stdout


def test_two_processes_cannot_have_the_same_part(t2v, whole, tmp_path):
    out = tmp_path / "records"
    record(t2v, out, 5, shard=(0, 2))
    with shard_lock(out / STATE_DIR, Shard(1, 2)):
        with pytest.raises(PtqError, match=rf"in use: process {os.getpid()} .* is making this shard"):
            calibrate(make_plan(t2v, 5), never, out, shard=Shard(1, 2))
        with pytest.raises(PtqError, match="another number of shards than 3"):
            calibrate(make_plan(t2v, 5), never, out, shard=Shard(1, 3))
        with pytest.raises(PtqError, match=r"Shard 1of2 is at work .* different: seed"):
            calibrate(make_plan(t2v, 5, seed=4), never, out, shard=Shard(0, 2), fresh=True)
        assert read_status(out).running == ["1of2"]
        calibrate(make_plan(t2v, 5), never, out, shard=Shard(0, 2))  # the other part is free
    record(t2v, out, 5, shard=(1, 2))
    assert file_digests(out) == file_digests(whole)


def test_fresh_in_one_shard_keeps_what_the_others_recorded(t2v, whole, tmp_path):
    out = tmp_path / "records"
    record(t2v, out, 5, shard=(0, 2))
    others = file_digests(out / "records")
    calibrate(make_plan(t2v, 5), lambda: load(str(t2v)), out, shard=Shard(1, 2), fresh=True)
    assert others.items() <= file_digests(out / "records").items()
    assert file_digests(out) == file_digests(whole)


def test_settings_without_records_may_change(t2v, tmp_path):
    """A run that failed before its first record (a wrong --records-per-prompt, say) does not occupy the directory."""
    out = tmp_path / "records"
    with pytest.raises(UsageError, match="should be recorded"):
        record(t2v, out, 2, records=20)
    assert record(t2v, out, 2, records=4)["complete"]


def die_in_the_second_write(pipe_dir, out, count):
    """Target of a child: SIGKILL while the second prompt's file is half written."""
    written = []

    def write(path, data):
        if ".safetensors." in path.name:
            written.append(path)
        if len(written) == 3:  # a prompt, the negative prompt, a prompt
            original(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, data)

    original, Path.write_bytes = Path.write_bytes, write
    record(pipe_dir, out, count)


def test_killed_in_the_middle_of_a_write(t2v, whole, tmp_path):
    out = tmp_path / "records"
    child = start_child(die_in_the_second_write, t2v, out, 5)
    child.join(240)
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in (out / "records").glob("[!.]*")] == ["00000.safetensors"]
    assert list((out / "records").glob(".*.part"))
    record(t2v, out, 5)
    assert file_digests(out) == file_digests(whole)  # leftovers are gone too


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_tmpfs(t2v, whole, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    size = sum(path.stat().st_size for path in (whole / "records").iterdir()) // 1024
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(mount)], capture_output=True
    ).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        with pytest.raises(PtqError, match=r"No space left.*GB are free"):
            record(t2v, mount / "records", 5)
        made = file_digests(mount / "records" / "records")
        assert 0 < len(made) < 5 and not list(mount.rglob("*.part"))
        assert made.items() <= file_digests(whole / "records").items()
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        record(t2v, mount / "records", 5)
        assert file_digests(mount / "records") == file_digests(whole)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_an_image_that_was_removed_is_named_and_nothing_is_lost(pipelines, tmp_path):
    image = tmp_path / "frame.png"
    Image.new("RGB", (32, 32), (9, 90, 200)).save(image)
    model, out = pipelines["I2V-A14B"], tmp_path / "records"
    record(model, out, 2, image=image, shard=(0, 2))
    image.rename(tmp_path / "elsewhere.png")
    with pytest.raises(PtqError, match=r"frame\.png"):
        record(model, out, 2, image=image, shard=(1, 2))
    assert [path.name for path in (out / "records").iterdir()] == ["00000.safetensors"]
    (tmp_path / "elsewhere.png").rename(image)
    assert record(model, out, 2, image=image)["complete"]
