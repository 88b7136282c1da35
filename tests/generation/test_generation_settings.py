"""The settings of the records reach `ptq generate` through the checkpoint, and leaving them is said."""

from __future__ import annotations

import json

from ptq.checkpoint.manifest import read_manifest
from ptq.generation.prepare import resolve_settings
from ptq.wan.layout import read_layout
from ptq.wan.loading import resolve_model


def test_a_checkpoint_generates_as_its_records_were_made(random_pipelines, packed, capsys) -> None:
    """The fixture records with 6 steps, where the model's preset has 8."""
    original = random_pipelines["T2V-A14B"]
    assert resolve_settings(resolve_model(str(original))).steps == 8
    settings = resolve_settings(resolve_model(str(packed["hif4"])))
    assert settings.steps == 6
    manifest = read_manifest(packed["hif4"])
    assert manifest.calibration["settings"]["steps"] == 6 and manifest.calibration["defaults"]["steps"] == 8
    assert "calibrated with" not in capsys.readouterr().err


def test_what_departs_is_said_in_one_line(packed, capsys) -> None:
    given = {"steps": 40, "flow_shift": 12.5, "negative_prompt": "bad " * 99, "fps": 30}
    resolve_settings(resolve_model(str(packed["hif4"])), given)
    (line,) = [line for line in _shown(capsys) if "calibrated with" in line]
    assert "steps 40 (calibrated with 6)" in line and "flow_shift 12.5 (calibrated with" in line
    assert line.count("calibrated with") == 4 and "fps" not in line and len(line) < 400


def test_a_preset_changed_by_hand_counts_as_leaving_them(packed, copy_of, capsys) -> None:
    directory = copy_of(packed["mxfp4"])
    preset = json.loads((directory / "ptq_preset.json").read_text())
    (directory / "ptq_preset.json").write_text(json.dumps(preset | {"steps": 3}))
    assert resolve_settings(read_layout(directory)).steps == 3
    assert any("steps 3 (calibrated with 6)" in line for line in _shown(capsys))


def test_a_checkpoint_of_before_is_taken_without_a_word(packed, copy_of, capsys) -> None:
    directory = copy_of(packed["mxfp4"])
    manifest = json.loads((directory / "ptq_manifest.json").read_text())
    del manifest["calibration"]["settings"], manifest["calibration"]["defaults"]
    (directory / "ptq_manifest.json").write_text(json.dumps(manifest))
    assert resolve_settings(read_layout(directory), {"steps": 4}).steps == 4
    (directory / "ptq_manifest.json").write_text(json.dumps(manifest | {"calibration": None}))
    assert resolve_settings(read_layout(directory), {"steps": 4}).steps == 4
    assert not any("calibrated with" in line for line in _shown(capsys))


def _shown(capsys) -> list[str]:
    shown = capsys.readouterr()
    return (shown.out + shown.err).splitlines()
