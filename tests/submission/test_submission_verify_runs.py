"""Runs that are not two honest runs of the same units are found, for the right reason."""

from __future__ import annotations

import hashlib
import io
import json
import random
from typing import Any

import numpy as np
import pytest
from submission_helpers import LINES, PAIRED, TOGETHER, UNIT, UNITS, by_name, redo_all, relabel

from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import digest
from ptq.submission import repeat
from ptq.submission.check import NotCheckedError
from ptq.submission.repeat import _device
from ptq.submission.runs import check_pairing, check_settings


def test_the_reference_run_is_the_candidates(tampered) -> None:
    for path in sorted((tampered.root / "runs/candidate").rglob("*")):
        if path.is_file():
            name = path.relative_to(tampered.root / "runs/candidate").as_posix()
            tampered.write(f"runs/reference/{name}", path.read_bytes())
    problems = tampered.problems()
    assert "the reference run is of a quantized checkpoint" in problems[TOGETHER]
    assert "both runs have the same result in 4 of 4 units" in problems[PAIRED]


def test_the_reference_run_is_the_candidates_under_another_name(tampered) -> None:
    original = tampered.read("runs/reference/run.json")["checkpoint"]["digest"]
    for path in sorted((tampered.root / "runs/candidate").rglob("*")):
        if path.is_file():
            name = path.relative_to(tampered.root / "runs/candidate").as_posix()
            tampered.write(f"runs/reference/{name}", path.read_bytes())
    relabel(tampered, "reference", original, format=None)
    problems = tampered.problems()
    assert TOGETHER not in problems and "one run stands for both" in problems[PAIRED]


def test_a_reference_that_is_no_embedded_model_is_not_checked(tampered) -> None:
    relabel(tampered, "reference", "0" * 64)
    redo_all(tampered)
    from ptq.submission.verify import check_contents

    tampered.redo_checksums()
    claims = by_name(check_contents(tampered.contents()))
    assert not [claim for claim in claims.values() if claim.holds is False]
    assert claims["the reference run is of the original model"].holds is None
    assert "the original model is not in the archive" in claims[UNIT].found


@pytest.mark.parametrize(
    ("role", "key", "value", "reason"),
    [
        ("reference", "seed", 5, "says seed = 5, its run and name give"),
        ("candidate", "steps", 40, "says steps = 40, its run and name give 3"),
        ("candidate", "prompt", "a red ring", "the prompt differ"),
        ("candidate", "latent_sha256", "0" * 64, "the initial noise differ"),
        ("reference", "checkpoint_digest", "0" * 64, "says checkpoint_digest"),
        ("candidate", "k", 1, "says unit ="),
    ],
)
def test_units_made_under_other_conditions(tampered, role: str, key: str, value: Any, reason: str) -> None:
    tampered.edit_lines(f"runs/{role}/{LINES}", lambda lines: [line.update({key: value}) for line in lines])
    tampered.redo_derived()
    assert reason in tampered.problems()[PAIRED]


def test_other_settings_of_one_run(tampered) -> None:
    def more(value: dict[str, Any]) -> None:
        value["settings"]["negative_prompt"] = "ugly"
        value["digest"] = digest(
            {
                "checkpoint_digest": value["checkpoint"]["digest"],
                **{k: value[k] for k in ("dataset", "settings", "versions")},
            }
        )

    tampered.edit("runs/reference/run.json", more)
    redo_all(tampered)
    assert "negative_prompt is 'ugly'" in tampered.problems()[PAIRED]


@pytest.mark.parametrize(
    ("name", "value"), [("cache", "first-block:0.05"), ("attention_backend", "fa3-fp8")], ids=["cache", "attention"]
)
def test_a_cache_or_attention_of_one_run_and_of_both(tampered, name: str, value: str) -> None:
    def changed(info: dict[str, Any]) -> None:
        info["settings"][name] = value

    tampered.edit("runs/candidate/run.json", changed)
    with pytest.raises(PtqError, match=rf"not paired: {name.replace('_', '-')} is None in .* and '{value}'"):
        check_pairing(tampered.contents())
    tampered.edit("runs/reference/run.json", changed)
    check_pairing(tampered.contents())
    with pytest.raises(NotCheckedError, match=rf"{name} '{value}' \(the model's own None\)"):
        check_settings(tampered.contents())


def test_attention_that_is_not_here_is_not_repeated(tampered, monkeypatch) -> None:
    for role in ("reference", "candidate"):
        tampered.edit(f"runs/{role}/run.json", lambda info: info["settings"].update(attention_backend="fa3"))
        tampered.edit_lines(f"runs/{role}/{LINES}", lambda lines: [line.update(device="cuda") for line in lines])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(NotCheckedError, match="made with --attention-backend fa3, which needs the package fa3-fwd"):
        _device(tampered.contents())


def test_settings_changed_without_their_digest(tampered) -> None:
    tampered.edit("runs/candidate/run.json", lambda value: value["versions"].update(torch="9"))
    assert "was changed: its digest is not that of its settings" in tampered.problems()[TOGETHER]


def test_a_failed_unit_hidden_by_the_plan(tampered) -> None:
    for role in ("reference", "candidate"):
        tampered.edit_lines(f"runs/{role}/{LINES}", lambda lines: lines[0].update(status="failed", error="black"))
    tampered.edit_lines(UNITS, lambda lines: lines.pop(0))
    assert "do not hold the same finished units" in tampered.problems()[PAIRED]


def test_one_result_for_two_units(tampered) -> None:
    """The same good video twice, in both runs: the noise of two units is never the same."""
    for role in ("reference", "candidate"):

        def copy(lines: list[Any], role: str = role) -> None:
            for key in ("video", "final_latents", "saved_frames"):
                data = (tampered.root / f"runs/{role}/{lines[0][key]}").read_bytes()
                tampered.write(f"runs/{role}/{lines[1][key]}", data)
                lines[1][f"{key}_sha256"] = lines[0][f"{key}_sha256"]

        tampered.edit_lines(f"runs/{role}/{LINES}", copy)
    assert "are one result" in tampered.problems()[PAIRED]


@pytest.mark.parametrize("key", ["saved_frames", "video"])
def test_one_file_for_two_units(tampered, key: str) -> None:
    tampered.edit_lines(f"runs/candidate/{LINES}", lambda lines: lines[1].update({key: lines[0][key]}))
    assert "are one result" in tampered.problems()[PAIRED]


def test_images_of_a_model_that_reads_none(tampered) -> None:
    """Units that start from an image are not generated again: a run cannot say so of a model without one."""
    for role in ("reference", "candidate"):
        tampered.edit_lines(
            f"runs/{role}/{LINES}", lambda lines: [line.update(image_sha256="1" * 64) for line in lines]
        )
    assert "started from an image, its run says otherwise" in tampered.problems()[PAIRED]


def test_frames_that_the_video_does_not_show(tampered) -> None:
    """Frames are what is measured; the video is what people see, and what VBench is given."""

    def swap(lines: list[Any]) -> None:
        for line in lines:
            shape = np.load(tampered.root / "runs/candidate" / line["saved_frames"])["frames"].shape
            buffer = io.BytesIO()
            np.savez_compressed(buffer, frames=np.zeros(shape, np.uint8))
            tampered.write(f"runs/candidate/{line['saved_frames']}", buffer.getvalue())
            line["saved_frames_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()

    tampered.edit_lines(f"runs/candidate/{LINES}", swap)
    with pytest.raises(DamagedFileError, match="video and saved frames show different pictures"):
        repeat.check_scores(tampered.contents())


def test_frames_are_among_the_bits_of_a_unit(tampered) -> None:
    tampered.edit_lines(
        f"runs/candidate/{LINES}", lambda lines: [x.update(saved_frames_sha256="0" * 64) for x in lines]
    )
    with pytest.raises(DamagedFileError, match="of the candidate: saved_frames_sha256 differ"):
        repeat.check_unit(tampered.contents())


@pytest.mark.parametrize("kind", ["videos", "latents", "frames"])
def test_a_file_that_is_not_its_manifest_line(tampered, kind: str) -> None:
    first, second = sorted((tampered.root / "runs/candidate" / kind).iterdir())[:2]
    tampered.write(first.relative_to(tampered.root).as_posix(), second.read_bytes())
    problem = tampered.problems()["videos, latents and frames have the digests of the runs"]
    assert first.name in problem and "its sha256 differs" in problem


def test_steps_that_would_take_for_ever(tampered) -> None:
    tampered.edit("runs/candidate/run.json", lambda value: value["settings"].update(steps=10**7))
    assert "asks for 10000000 steps" in tampered.problems()[PAIRED]


def test_which_unit_is_generated_is_drawn_here(tampered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad bits in one unit are found exactly when that unit is drawn: nothing in the archive says which it will be."""

    def forge(lines: list[Any]) -> None:
        lines[-1]["final_latents_sha256"] = "0" * 64

    tampered.edit_lines(f"runs/candidate/{LINES}", forge)
    bad = json.loads((tampered.root / f"runs/candidate/{LINES}").read_text().splitlines()[-1])["unit"]
    drawn: list[list[str]] = []

    class Fixed(random.Random):
        def choice(self, seq):
            drawn.append(list(seq))
            return bad

    monkeypatch.setattr(repeat, "_draw", Fixed(0))
    with pytest.raises(Exception, match=f"{bad} of the candidate: final_latents_sha256 differ"):
        repeat.check_unit(tampered.contents())
    assert len(drawn[0]) == 4
