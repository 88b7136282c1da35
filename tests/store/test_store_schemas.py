"""Artifacts as the stages write them come back byte for byte; anything else is refused with file and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptq.errors import DamagedFileError, PtqError
from ptq.store import calibration, evaluation, evaluation_units, run_info, run_manifest, sensitivity, submission
from ptq.store.files import write_json

ESTIMATE = {"value": 0.001, "low": -0.002, "high": 0.003}
DIMENSION = {"reference": 0.9, "candidate": 0.8, "relative_loss": ESTIMATE, "points": ESTIMATE, "units": 2}
RUN = {
    "schema": 1,
    "model": "tiny",
    "checkpoint": {"digest": "d" * 64, "format": None},
    "dataset": "world",
    "settings": {"height": 64, "flow_shift": 3.0, "negative_prompt": "模糊", "save_frames": False, "backend": None},
    "versions": {"ptq": "0.1.0"},
    "digest": "e" * 64,
    "not_applied": "nothing",
    "plan": {"units": 2, "samples_per_prompt": 1, "shards": 2, "prompts": {"file": "p.txt", "samples": 2}},
}
CALIBRATION = {
    "variant": "I2V-A14B",
    "experts": {"transformer": "a"},
    "preset": {"height": 32, "guidance_scale": 4.0},
    "prompts": {"name": "p.txt", "sha256": "0"},
    "samples": [{"dataset": "p", "id": "0", "caption_digest": "c"}],
    "records_per_prompt": 4,
    "seed": 3,
    "image_policy": None,
    "schedule": [{"index": 0, "timestep": 999.0, "sigma": 0.5, "d_sigma": 0.25, "expert": "transformer"}],
    "complete": True,
    "files": {"00000.safetensors": "f"},
    "digest": "g",
}
EVALUATION = {
    "schema": 1,
    "ptq_version": "0.1.0",
    "suite": "tiny",
    "format": "hif4",
    "limit": 0.005,
    "gate": "mean_signed",
    "bootstrap": {"resamples": 1000, "seed": 0, "confidence": 0.95, "method": "m"},
    "reference": {"directory": "r", "run_digest": "1", "settings": {"steps": 4}, "versions": {"ptq": "0.1.0"}},
    "candidate": {"file": "c.json"},
    "units": 2,
    "excluded": {"a/b/0": "failed"},
    "dimensions": {"colour": DIMENSION},
    "aggregates": {"mean_signed": ESTIMATE},
    "verdict": "PASS",
    "prompts": 2,
    "warnings": [],
}
UNIT = {
    "unit": "w/s/0",
    "inputs": "i",
    "source": "decoded video",
    "reference": {"colour": 1.0, "sharpness": None},
    "candidate": {"colour": 1, "sharpness": 2.5},
    "paired": {"psnr": 30.0},
    "hashes": {"reference": "a", "candidate": "b"},
}
LINE = {
    "unit": "w/s/0", "sample_id": "s", "k": 0, "prompt": "p", "score_prompt": "p", "seed": 7, "latent_sha256": "l",
    "width": 64, "height": 32, "frames": 5, "fps": 8, "flow_shift": 3, "guidance_scale": 4.0, "video": "videos/s-0.mp4",
    "video_sha256": "v", "image_source": {"kind": "crop", "frame": 0, "crop": [0, 9, 1, 8], "resize": "cover"},
    "finished": "2026-01-01T00:00:00Z", "status": "done", "error": None,
}  # fmt: skip
SENSITIVITY = {
    "metric": "error",
    "quantize_one": [{"expert": "transformer", "block": 0, "error": 1e-4}],
    "picks": [{"expert": "transformer", "block": 0, "before": 2e-3, "after": 1e-3}],
    "comparison": {"none": 2e-3, "auto": 1e-3},
}
SUBMISSION = {
    "budget_scope": "total", "checkpoint_digest": "d", "failing_gate_allowed": False, "format": "hif4",
    "high_precision": ["transformer:0"], "limit": 0.005, "schema": 1, "variant": "T2V-A14B", "verdict": "PASS",
}  # fmt: skip


def read_calibration(directory: Path) -> Any:
    return calibration.read_calibration(directory / calibration.FILE)


FILES: list[tuple[str, dict, Callable[[Path], Any]]] = [
    (calibration.FILE, CALIBRATION, read_calibration),
    (run_info.FILE, RUN, run_info.read_run_info),
    (evaluation.FILE, EVALUATION, evaluation.read_evaluation),
    (sensitivity.SENSITIVITY_FILE, SENSITIVITY, sensitivity.read_sensitivity),
    (submission.FILE, SUBMISSION, submission.read_submission),
]


@pytest.mark.parametrize(("name", "content", "read"), FILES)
def test_what_was_read_is_written_with_the_same_bytes(tmp_path, name, content, read) -> None:
    write_json(tmp_path / name, content)
    before = (tmp_path / name).read_bytes()
    found = read(tmp_path)
    if name == submission.FILE:  # its keys are sorted
        assert found.as_bytes() == before
        return
    write_json(tmp_path / name, found.as_json())
    assert (tmp_path / name).read_bytes() == before


def test_lines_keep_their_bytes_too(tmp_path) -> None:
    text = json.dumps(UNIT, ensure_ascii=False) + "\n"
    (tmp_path / evaluation_units.FILE).write_text(text)
    evaluation_units.write_units(tmp_path, evaluation_units.read_units(tmp_path))
    assert (tmp_path / evaluation_units.FILE).read_text() == text
    (tmp_path / "manifest-0of1.jsonl").write_text(json.dumps(LINE) + "\n")
    (line,) = run_manifest.read_lines(tmp_path).values()
    assert json.dumps(line.as_json()) == json.dumps(LINE)  # 3 is not written as 3.0


@pytest.mark.parametrize(("name", "content", "read"), FILES)
def test_an_unknown_key_is_refused_with_file_and_field(tmp_path, name, content, read) -> None:
    write_json(tmp_path / name, {**content, "suprise": 1})
    with pytest.raises(DamagedFileError, match=rf"{name} is not a file .*suprise: Extra inputs"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        (run_info.FILE, lambda c: c["plan"].update(units="2"), r"plan\.units"),
        (run_info.FILE, lambda c: c.pop("digest"), "digest: Field required"),
        (run_info.FILE, lambda c: c.update(schema=2), "schema"),
        (calibration.FILE, lambda c: c["schedule"][0].update(sigma=None), r"schedule\.0\.sigma"),
        (calibration.FILE, lambda c: c.pop("samples"), "samples: Field required"),
        (evaluation.FILE, lambda c: c["dimensions"]["colour"]["points"].pop("low"), r"dimensions\.colour\.points\.low"),
        (evaluation.FILE, lambda c: c.update(verdict="MAYBE"), "verdict"),
        (sensitivity.SENSITIVITY_FILE, lambda c: c["picks"][0].update(block="0"), r"picks\.0\.block"),
        (submission.FILE, lambda c: c.update(high_precision="transformer:0"), "high_precision"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, change, found) -> None:
    content, read = next((json.loads(json.dumps(c)), r) for n, c, r in FILES if n == name)
    change(content)
    write_json(tmp_path / name, content)
    with pytest.raises(DamagedFileError, match=rf"{name} .*{found}"):
        read(tmp_path)


@pytest.mark.parametrize(("name", "content", "read"), FILES)
@pytest.mark.parametrize("text", ["", "[]", '{"a": ', "\x00"])
def test_what_is_no_object_is_refused(tmp_path, name, content, read, text) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DamagedFileError, match=name):
        read(tmp_path)


@pytest.mark.parametrize(("name", "content", "read"), FILES)
def test_what_is_not_there_is_said(tmp_path, name, content, read) -> None:
    with pytest.raises(PtqError, match=name):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"seed": None}, "a finished unit without seed"),
        ({"width": "64"}, "width"),
        ({"flow_shift": True}, "flow_shift"),
        ({"status": "maybe"}, "status"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_damaged_manifest_line_is_named(tmp_path, change, found) -> None:
    (tmp_path / "manifest-0of1.jsonl").write_text(f"{json.dumps(LINE)}\n{json.dumps({**LINE, **change})}\n")
    with pytest.raises(DamagedFileError, match=rf"manifest-0of1\.jsonl, line 2 is damaged .*{found}.*Delete that line"):
        run_manifest.read_lines(tmp_path)


def test_of_two_finished_lines_the_later_one_counts(tmp_path) -> None:
    """Also where the later one is in the manifest that is read first; a failure never hides a finished unit."""
    later = {**LINE, "video_sha256": "new", "finished": "2026-01-02T00:00:00Z"}
    failed = {"unit": LINE["unit"], "status": "failed", "error": "no", "finished": "2026-01-03T00:00:00Z"}
    for tag, line in (("0of2", later), ("0of1", LINE), ("1of2", failed)):
        (tmp_path / f"manifest-{tag}.jsonl").write_text(json.dumps(line) + "\n")
    assert run_manifest.read_lines(tmp_path)[LINE["unit"]].video_sha256 == "new"


def test_damaged_units_are_refused_or_left_out(tmp_path) -> None:
    broken = {**UNIT, "candidate": {"colour": "red"}}
    (tmp_path / evaluation_units.FILE).write_text(f"{json.dumps(UNIT)}\n{json.dumps(broken)}\n")
    with pytest.raises(DamagedFileError, match=r"units\.jsonl, record 2: candidate\.colour"):
        evaluation_units.read_units(tmp_path)
    assert len(evaluation_units.read_units(tmp_path, skip_damaged=True)) == 1


def test_protection_is_a_list_of_picks(tmp_path) -> None:
    picks = [sensitivity.Pick(**pick) for pick in SENSITIVITY["picks"]]
    sensitivity.write_protection(tmp_path, picks)
    assert json.loads((tmp_path / sensitivity.PROTECTION_FILE).read_text()) == SENSITIVITY["picks"]
    assert sensitivity.read_protection(tmp_path) == picks
    for damage in ({}, [{"expert": "transformer"}]):
        write_json(tmp_path / sensitivity.PROTECTION_FILE, damage)
        with pytest.raises(DamagedFileError, match=r"protection\.json.*run the same command"):
            sensitivity.read_protection(tmp_path)
