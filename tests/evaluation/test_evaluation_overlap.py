"""Prompts that the weights were calibrated with are not judged on, unless asked for by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from evaluation_runs import make_run, moving_noise
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import PtqError
from ptq.evaluation import evaluate_runs, plan
from ptq.store.files import read_json
from ptq.wan.card import model_card
from ptq.wan.identity import identify_model

CALIBRATED = "A red ball  rolls over the GRASS"
"""As the records of `packed` were made with it, but for case and white space."""


@pytest.fixture
def runs(packed: dict[str, Path], tmp_path: Path) -> list[Path]:
    """Two runs of three prompts, one of them twice; the candidate is of the packed checkpoint."""
    names = ["d/seen/0", "d/seen/1", "d/new/0", "d/other/0"]
    clips = {name: moving_noise(3, 32, 32, seed=seed) for seed, name in enumerate(names)}
    prompts = {name: CALIBRATED if "seen" in name else name for name in names}
    checkpoint = {"digest": identify_model("x", packed["hif4"]).digest, "format": "hif4"}
    info = {"model": str(packed["hif4"]), "checkpoint": checkpoint}
    return [
        make_run(tmp_path / "ref", clips, prompts=prompts),
        make_run(tmp_path / "cand", clips, prompts=prompts, info=info),
    ]


def test_seen_prompts_are_refused_before_anything_is_measured(runs, packed, tmp_path):
    out = tmp_path / "out"
    words = f"1 of 3 evaluated prompts are among those that {packed['hif4']} was calibrated with"
    with pytest.raises(PtqError, match=words) as raised:
        evaluate_runs(*runs, out)
    assert "(d/seen/0)" in str(raised.value) and "--allow-overlap" in str(raised.value)
    assert not (out / "units.jsonl").exists()
    with pytest.raises(PtqError, match=words):
        plan(*runs)
    assert plan(*runs, allow_overlap=True)["units"] == 4


def test_allowed_overlap_is_what_the_evaluation_and_the_card_say(runs, packed, tmp_path):
    from ptq.checkpoint.manifest import read_manifest
    from ptq.store.evaluation import read_evaluation

    out = tmp_path / "out"
    command = ["evaluate", "--reference", str(runs[0]), "--candidate", str(runs[1]), "--out", str(out), "--json"]
    result = CliRunner().invoke(app, [*command, "--allow-overlap"])
    assert result.exit_code == 0, result.output
    content = read_json(out / "evaluation.json")
    assert content["overlap"] == 1 and "1 of 3 evaluated prompts are among those" in content["warnings"][0]
    assert "let pass: the evaluation is not held out" in content["warnings"][0]
    judged = read_evaluation(out)
    again = ["--yardstick", str(runs[1]), "--candidate", str(runs[0]), "--out", str(tmp_path / "beside")]
    assert CliRunner().invoke(app, ["evaluate", "--reference", str(runs[0]), *again]).exit_code == 0
    beside = read_json(tmp_path / "beside" / "evaluation.json")["yardstick"]
    assert "1 of the evaluated prompts are among those that it was calibrated with." in beside["warnings"]
    assert "1 of the prompts were calibration prompts" in model_card(read_manifest(packed["hif4"]), judged)


def test_what_cannot_be_known_is_left_open(runs, packed, tmp_path):
    """Without the checkpoint, or with another in its place, nothing is claimed; with none in common, zero is."""
    moved = shutil.copytree(runs[1], tmp_path / "moved")
    info = read_json(moved / "run.json")
    (moved / "run.json").write_text(json.dumps(info | {"model": str(tmp_path / "gone")}))
    assert evaluate_runs(runs[0], moved, tmp_path / "a").overlap is None
    (moved / "run.json").write_text(json.dumps(info | {"model": str(packed["mxfp4"])}))
    assert evaluate_runs(runs[0], moved, tmp_path / "a").overlap is None
    lines = {run: (run / "manifest-0of1.jsonl").read_text().splitlines()[2:] for run in runs}
    for run, kept in lines.items():
        (run / "manifest-0of1.jsonl").write_text("".join(f"{line}\n" for line in kept))
    evaluation = evaluate_runs(*runs, tmp_path / "b")
    assert evaluation.overlap == 0 and not any("calibrated" in text for text in evaluation.warnings)
