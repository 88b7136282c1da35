"""Preflight finds every problem at once, says what to do, and leaves nothing behind."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptq.checkpoint import shards as shards_module
from ptq.cli.main import app
from ptq.errors import PtqError, UsageError
from ptq.wan import trial as trial_module
from ptq.wan.layout import read_layout
from ptq.wan.preflight import Needs, preflight
from ptq.wan.trial import run_trial

HUGE = 10**18


def test_a_good_model_passes_and_nothing_is_left(random_pipelines, packed, tmp_path: Path):
    for path in (random_pipelines["I2V-A14B"], packed["hif4"], packed["mxfp4"]):
        preflight(read_layout(path), lambda: Needs(1000, 1000), tmp_path / "runs" / "out", "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_name", ["hif4", "mxfp4"])
def test_the_trial_is_short(format_name, tmp_path: Path):
    run_trial(tmp_path, format_name, "cpu")
    start = time.process_time()
    run_trial(tmp_path, format_name, "cpu")
    assert time.process_time() - start < 2.0


def test_all_problems_are_told_together(random_pipelines, copy_of, tmp_path: Path):
    model = copy_of(random_pipelines["T2V-A14B"])
    (shard,) = sorted((model / "transformer").glob("*-00001-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    config = json.loads((model / "transformer_2" / "config.json").read_text())
    (model / "transformer_2" / "config.json").write_text(json.dumps({**config, "ffn_dim": 320}))
    with pytest.raises(PtqError) as caught:
        preflight(read_layout(model), Needs, tmp_path / "out", "cpu")
    text = str(caught.value)
    assert text.startswith("2 problems found") and "--no-preflight" in text
    assert f"{shard} is truncated" in text
    assert "blocks.0.ffn.net.0.proj.weight: expected [320, 128], found [256, 128]" in text
    with pytest.raises(PtqError) as caught:
        preflight(read_layout(random_pipelines["T2V-A14B"]), lambda: Needs(HUGE, HUGE), tmp_path / "out", "cpu")
    text = str(caught.value)
    assert text.startswith("2 problems found") and "will be written to" in text and "of RAM are needed" in text


def test_missing_tensors_are_counted(random_pipelines, copy_of, tmp_path: Path):
    model = copy_of(random_pipelines["TI2V-5B"])
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(PtqError, match=r"first blocks\.2\.\S+: expected .*, found none"):
        preflight(read_layout(model), Needs, tmp_path / "out", "cpu")


def test_a_disk_that_returns_other_bytes_is_noticed(random_pipelines, tmp_path: Path, monkeypatch):
    def damage(directory, ordered, *arguments):
        shards_module.write_component(directory, ordered, *arguments)
        (file,) = Path(directory).glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(trial_module, "write_component", damage)
    with pytest.raises(PtqError, match="checksum"):
        preflight(read_layout(random_pipelines["TI2V-5B"]), Needs, tmp_path / "out", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PtqError, match="Cannot write into"):
        run_trial(tmp_path / "file" / "out", "hif4", "cpu")


@pytest.mark.parametrize(("device", "text"), [("gpu", "cuda:<n>"), ("meta", "cuda:<n>")])
def test_unknown_devices_are_refused(random_pipelines, tmp_path: Path, device, text):
    with pytest.raises(UsageError, match=text):
        preflight(read_layout(random_pipelines["TI2V-5B"]), Needs, tmp_path / "out", device)


def test_generate_checks_before_it_loads_and_can_be_told_not_to(random_pipelines, copy_of, tmp_path: Path):
    model = copy_of(random_pipelines["T2V-A14B"])
    for shard in (model / "transformer_2").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-5])
    command = [
        "generate",
        str(model),
        "--prompt",
        "a cat",
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--steps",
        "1",
    ]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, PtqError) and "One problem found before starting" in str(result.exception)
    assert not (tmp_path / "run").exists()
    result = CliRunner().invoke(app, [*command, "--no-preflight", "--retries", "0"])
    assert isinstance(result.exception, PtqError) and "before starting" not in str(result.exception)
    assert "is truncated" in str(result.exception)


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
