"""Scores, rules and verdict of an archive are computed again: every way of bending them is found, for the right reason."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from submission_helpers import (
    EVALUATION,
    LINES,
    MANIFEST,
    NUMBERS,
    PAIRED,
    RULES,
    SCORES,
    SHOWN,
    UNIT,
    UNITS,
    VERDICT,
    redo_all,
    relabel,
)


def test_a_bad_dimension_left_out(tampered) -> None:
    def halve(lines: list[Any]) -> None:
        for line in lines:
            line["candidate"]["colour"] = 0.5 * line["reference"]["colour"]

    tampered.edit_lines(UNITS, halve)
    tampered.edit(EVALUATION, lambda judged: judged["dimensions"].pop("colour"))
    tampered.redo_evaluation()
    tampered.redo_derived()
    assert "suite tiny counts colour, shape, direction, temporal_flickering" in tampered.problems()[RULES]


def test_a_dimension_removed_from_units_too(tampered) -> None:
    def remove(lines: list[Any]) -> None:
        for line in lines:
            del line["candidate"]["colour"], line["reference"]["colour"]

    tampered.edit_lines(UNITS, remove)
    tampered.edit(EVALUATION, lambda judged: judged["dimensions"].pop("colour"))
    tampered.redo_evaluation()
    problems = tampered.problems()
    assert "colour of the reference has no score for 4 of 4 units" in problems[SCORES] and RULES in problems


def test_bad_units_left_out_of_the_evaluation(tampered) -> None:
    tampered.edit_lines(UNITS, lambda lines: lines.__delitem__(slice(1, None)))
    tampered.redo_evaluation()
    tampered.redo_derived()
    problems = tampered.problems()
    assert "1 lines for 4 units of the runs" in problems[SCORES] and "3 such units" in problems[SCORES]


def test_bad_units_left_out_of_evaluation_and_runs(tampered) -> None:
    tampered.edit_lines(UNITS, lambda lines: lines.__delitem__(slice(1, None)))
    kept = json.loads((tampered.root / UNITS).read_text())["unit"]
    for role in ("reference", "candidate"):
        tampered.edit_lines(
            f"runs/{role}/{LINES}",
            lambda lines: lines.__setitem__(slice(None), [x for x in lines if x["unit"] == kept]),
        )
    tampered.redo_evaluation()
    tampered.redo_derived()
    assert "3 units of the reference (planned, but never started)" in tampered.problems()[PAIRED]


def test_a_unit_counted_twice(tampered) -> None:
    tampered.edit_lines(UNITS, lambda lines: lines.append(lines[0]))
    tampered.redo_evaluation()
    assert "occurs twice" in tampered.problems()[SCORES]


def test_excluded_units_are_not_by_the_rules(tampered) -> None:
    tampered.edit(EVALUATION, lambda judged: judged.update(excluded={"held-out/x/0": "failed"}))
    assert "1 units are left out, for example held-out/x/0" in tampered.problems()[RULES]


def test_scores_beyond_their_range(tampered) -> None:
    tampered.edit_lines(UNITS, lambda lines: [line["candidate"].update(colour=5.0) for line in lines])
    tampered.redo_evaluation()
    assert "colour = 5.0, which lies between 0 and 1" in tampered.problems()[SCORES]


def test_a_measure_that_nobody_knows(tampered) -> None:
    tampered.edit_lines(UNITS, lambda lines: [line["candidate"].update(beauty=1.0) for line in lines])
    assert "beauty is no measure" in tampered.problems()[SCORES]


@pytest.mark.parametrize("name", [UNITS, EVALUATION])
def test_claimed_nan(tampered, name: str) -> None:
    if name == UNITS:
        tampered.edit_lines(name, lambda lines: lines[0]["candidate"].update(colour=float("nan")))
    else:
        tampered.edit(name, lambda judged: judged["aggregates"]["mean_signed"].update(value=float("nan")))
    assert any("finite" in problem or "NaN" in problem for problem in tampered.problems().values())


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("aggregates", "mean_signed", "low"), -0.5),
        (("aggregates", "mean_positive", "value"), 0.0),
        (("dimensions", "colour", "relative_loss", "high"), 0.0),
        (("dimensions", "colour", "candidate"), 1.0),
        (("informative", "sharpness", "reference"), 1.0),
        (("paired", "psnr", "mean"), 99.0),
        (("prompts",), 400),
        (("units",), 400),
        (("duplicates", "reference"), [["a", "b"]]),
        (("candidate", "settings", "steps"), 40),
        (("sources",), {"saved frames": 400}),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
def test_an_invented_number(tampered, where: tuple[str, ...], value: Any) -> None:
    def invent(judged: dict[str, Any]) -> None:
        *path, last = where
        for key in path:
            judged = judged[key]
        judged[last] = value

    tampered.edit(EVALUATION, invent)
    tampered.redo_derived()
    problem = tampered.problems()[NUMBERS]
    assert f"says {'.'.join(where)}" in problem and "its units give" in problem


def test_a_warning_removed(tampered) -> None:
    tampered.edit(EVALUATION, lambda judged: judged.update(warnings=[]))
    assert "lacks a warning that its units give: Only 4 prompts" in tampered.problems()[NUMBERS]


def test_a_flipped_verdict(tampered) -> None:
    before = tampered.read(EVALUATION)["verdict"]
    tampered.edit(EVALUATION, lambda judged: judged.update(verdict="FAIL" if before == "PASS" else "PASS"))
    tampered.redo_derived()
    problems = tampered.problems()
    assert "its units give" in problems[VERDICT] and "verdict" in problems[NUMBERS]


def test_a_seed_that_was_searched_for(tampered, monkeypatch: pytest.MonkeyPatch) -> None:
    """All recorded numbers follow from the units, and still the rules' own bootstrap decides."""
    from ptq.submission import scores

    real = scores._compute

    def unlucky(contents, resamples: int, seed: int):
        found = real(contents, resamples, seed)
        other = "FAIL" if found.verdict == "PASS" else "PASS"
        return found.model_copy(update={"verdict": other}) if resamples == scores.RESAMPLES else found

    monkeypatch.setattr(scores, "_compute", unlucky)
    problems = tampered.problems()
    assert list(problems) == [VERDICT] and "by the rules (10000 resamples, seed 0)" in problems[VERDICT]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gate": "mean_score"}, "the gate is mean_score, by the rules mean_signed"),
        ({"limit": 0.05}, r"the limit is 0.05, by the rules 0.005"),
        ({"format": "mxfp4", "limit": 0.01}, "the format is mxfp4, by the rules hif4"),
        ({"bootstrap": {"resamples": 10**12}}, "1000000000000 resamples"),
        ({"bootstrap": {"resamples": 10}}, "from 10 resamples, by the rules from 1000"),
        ({"bootstrap": {"seed": -1}}, "the seed of the intervals is -1"),
        ({"bootstrap": {"confidence": 0.5}}, "the confidence is 0.5, by the rules 0.95"),
        ({"suite": "core"}, "the gate is mean_signed, by the rules None"),
        ({"suite": "mine"}, "no suite 'mine'"),
    ],
    ids=str,
)
def test_other_rules(tampered, change: dict[str, Any], reason: str) -> None:
    def apply(judged: dict[str, Any]) -> None:
        for key, value in change.items():
            judged[key] = {**judged[key], **value} if isinstance(value, dict) else value

    tampered.edit(EVALUATION, apply)
    tampered.redo_derived()
    assert reason in tampered.problems()[RULES]


def test_scores_that_the_videos_do_not_show(tampered) -> None:
    """Consistent in itself: units, evaluation, texts; only measuring again tells."""

    def better(lines: list[Any]) -> None:
        for line in lines:
            for name in ("colour", "shape", "direction"):
                line["candidate"][name] = line["reference"][name]

    tampered.edit_lines(UNITS, better)
    tampered.redo_evaluation()
    redo_all(tampered)
    problems = tampered.problems()
    assert list(problems) == [SHOWN] and "its videos give" in problems[SHOWN]


def test_scores_of_units_that_are_not_in_the_archive(tampered) -> None:
    """Of a reference that nobody has here, the candidate's own scores are measured again all the same."""

    def better(lines: list[Any]) -> None:
        for line in lines:
            line["candidate"]["sharpness"] = line["reference"]["sharpness"]

    relabel(tampered, "reference", "0" * 64)
    for role in ("reference", "candidate"):
        for folder in ("videos", "latents", "frames"):
            shutil.rmtree(tampered.root / "runs" / role / folder)
    tampered.edit_lines(UNITS, better)
    redo_all(tampered)
    assert "candidate: units.jsonl says sharpness" in tampered.problems(regenerate=True)[UNIT]


def test_scores_of_other_files(tampered) -> None:
    tampered.edit_lines(UNITS, lambda lines: lines[0].update(inputs="0" * 64))
    redo_all(tampered)
    assert "was measured on other files than the runs have now" in tampered.problems()[SCORES]


def test_prompts_of_the_calibration(tampered) -> None:
    from ptq.prompts import caption_digest

    seen = tampered.read(MANIFEST)["calibration"]["samples"][0]["caption_digest"]
    own = json.loads((tampered.root / f"runs/candidate/{LINES}").read_text().splitlines()[0])
    assert caption_digest(own["prompt"]) != seen
    same = {"caption_digest": caption_digest(own["prompt"])}
    tampered.edit(MANIFEST, lambda manifest: manifest["calibration"]["samples"][0].update(same))
    problem = tampered.problems()["no evaluated prompt was a calibration prompt"]
    assert "1 of 4 units are of prompts that the weights were calibrated with" in problem and own["unit"] in problem


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"warnings": ["Certified."]}, "has a warning that its units do not give: 'Certified.'"),
        ({"vbench": {"scores": {"imaging_quality": 0.99}}}, "which suite tiny does not use"),
    ],
    ids=["warning", "vbench"],
)
def test_words_and_results_that_nobody_measured(tampered, change: dict[str, Any], reason: str) -> None:
    def add(judged: dict[str, Any]) -> None:
        judged.update({key: judged[key] + value if key == "warnings" else value for key, value in change.items()})

    tampered.edit(EVALUATION, add)
    tampered.redo_derived()
    assert reason in tampered.problems()[NUMBERS]
