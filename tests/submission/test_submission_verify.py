"""An honest submission verifies and says what nobody checked; every way of tampering is found, for the right reason."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ptq.checkpoint.manifest import MANIFEST_FILE
from ptq.cli.main import app
from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import digest
from ptq.submission import repeat
from ptq.submission.check import Claim, NotCheckedError
from ptq.submission.repeat import _device
from ptq.submission.runs import check_pairing, check_settings
from ptq.submission.verify import verify
from ptq.wan.identity import identify_model

EVALUATION, UNITS = "evaluation/evaluation.json", "evaluation/units.jsonl"
MANIFEST = f"weights/{MANIFEST_FILE}"
LINES = "manifest-0of1.jsonl"
RULES = "the evaluation is by the rules"
SCORES = "every unit has every score, in the range of its measure"
NUMBERS = "every number of evaluation.json, from the units"
VERDICT = "the verdict, by the bootstrap of the rules"
TEXTS = "recipe, prompts, README, script, model card and submission.json"
TOGETHER = "runs, evaluation and weights belong together"
PAIRED = "both runs are whole, and only the weights differ"
SHOWN = "what the videos show, measured again"
UNIT = "a unit, generated again, has its bits and scores"


def by_name(claims: list[Claim]) -> dict[str, Claim]:
    return {claim.name: claim for claim in claims}


def test_an_honest_archive_holds_and_lists_what_nobody_checked(archive: Path) -> None:
    claims = verify(archive, max_bytes=10**9)
    assert [claim for claim in claims if claim.holds is False] == []
    found = by_name(claims)
    assert found[UNIT].holds and "of the original model; both measured again" in found[UNIT].found
    assert found[SHOWN].found == "4 of 4 units"
    assert {claim.name for claim in claims if claim.holds is None} == {
        "both runs have the model's own settings",
        "the prompts are those of the challenge",
        "errors, times, versions and names in manifest and runs",
        "text and pictures of the report",
    }
    assert found["both runs have the model's own settings"].found.startswith("both runs have steps 3 (the model's own ")
    assert all((claim.holds is None) == (claim.how == "not checked") for claim in claims)


def test_the_command_lists_every_claim_and_fails_when_one_does_not_hold(
    archive: Path, tampered, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["verify", str(archive), "--no-regenerate", "--json"])
    assert result.exit_code == 0, result.output
    listed = json.loads(result.stdout)
    assert {tuple(one) for one in listed} == {("name", "how", "holds", "found")}
    assert by_name([Claim(**one) for one in listed])[UNIT].found == "--no-regenerate"
    from ptq.submission.archive import write_archive

    tampered.write("README.md", b"All is well.\n")
    tampered.redo_checksums()
    write_archive(tmp_path / "bad.tar.gz", {name: tampered.root / name for name in tampered.names()})
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "bad.tar.gz"), "--json"])
    assert result.exit_code == 1
    claims = by_name([Claim(**one) for one in json.loads(result.stdout)])
    assert claims[TEXTS].holds is False and claims[UNIT].holds is None and "not tried" in claims[UNIT].found


# Scores.


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


def redo_all(tampered) -> None:
    """evaluation.json exactly as `ptq evaluate` would write it from these units, and what is derived from it."""
    from ptq.submission.scores import _compute

    judged = tampered.contents().evaluation
    again = _compute(tampered.contents(), judged.bootstrap.resamples, judged.bootstrap.seed)
    tampered.edit(EVALUATION, lambda value: value.update(again.as_json()))
    tampered.redo_derived()


# Texts and claims.


@pytest.mark.parametrize("name", ["README.md", "reproduce.sh", "recipe.yaml", "prompts.jsonl", "weights/README.md"])
def test_an_edited_text(tampered, name: str) -> None:
    data = (tampered.root / name).read_bytes()
    tampered.write(name, data + b"# and more\n")
    assert f"{name} is not what manifest, evaluation and runs give" in tampered.problems()[TEXTS]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "mxfp4"},
        {"budget_scope": "per-expert"},
        {"limit": 0.1},
        {"verdict": None},
        {"variant": "TI2V-5B"},
        {"failing_gate_allowed": None},
    ],
    ids=str,
)
def test_other_claims_in_submission_json(tampered, change: dict[str, Any]) -> None:
    before = tampered.read("submission.json")["failing_gate_allowed"]
    change = {key: not before if key == "failing_gate_allowed" else value for key, value in change.items()}
    tampered.edit("submission.json", lambda claims: claims.update(change))
    assert "submission.json is not what" in tampered.problems()[TEXTS]


def test_a_replaced_recipe(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["recipe"]["scheme"].update(transform="hadamard", block=64))
    tampered.redo_derived()
    problems = tampered.problems()
    assert (
        "recipe of the manifest say HiF4, transform hadamard"
        in problems["format, transform and quantized layers, from the tensors"]
    )


def test_a_replaced_source(tampered) -> None:
    tampered.write("source/ptq/rules.py", b"import os\n")
    problem = tampered.problems()["the source is that of the package"]
    assert "1 files of source/" in problem and "source/ptq/rules.py" in problem


def test_source_added_and_removed(tampered) -> None:
    tampered.write("source/ptq/backdoor.py", b"import os\n")
    (tampered.root / "source/ptq/limits.py").unlink()
    assert "2 files of source/" in tampered.problems()["the source is that of the package"]


def test_another_calibration(tampered) -> None:
    tampered.edit("calibration/calibration.json", lambda info: info.update(seed=99))
    tampered.redo_derived()
    assert "its digest is" in tampered.problems()["the calibration is the one of the manifest"]


# Members.


def test_a_flipped_byte_in_any_kind_of_member(tampered) -> None:
    from ptq.submission.members import check_checksums

    for name in ("weights/vae/config.json", UNITS, "report/report.pdf", "source/ptq/version.py"):
        data = bytearray((tampered.root / name).read_bytes())
        data[len(data) // 2] ^= 1
        tampered.write(name, bytes(data))
        with pytest.raises(Exception, match="was changed: its sha256"):
            check_checksums(tampered.contents())
        data[len(data) // 2] ^= 1
        tampered.write(name, bytes(data))
    check_checksums(tampered.contents())


@pytest.mark.parametrize(
    "name", ["report/report.pdf", UNITS, "reproduce.sh", "weights/vae/config.json", "runs/reference/run.json"]
)
def test_a_removed_member(tampered, name: str) -> None:
    (tampered.root / name).unlink()
    problems = tampered.problems()
    assert any("missing" in problem or "does not exist" in problem for problem in problems.values())


def test_one_video_removed(tampered) -> None:
    next((tampered.root / "runs/candidate/videos").iterdir()).unlink()
    assert "missing: runs/candidate/videos" in tampered.problems()["the members are those of a submission"]


@pytest.mark.parametrize("name", ["extra.txt", "runs/candidate/notes.md", "evaluation/better.json", "source/setup.py"])
def test_an_unexpected_member(tampered, name: str) -> None:
    tampered.write(name, b"x")
    problems = tampered.problems()
    assert f"{name} does not belong in a submission" in problems["the members are those of a submission"]


@pytest.mark.parametrize(
    "name", ["text_encoder/pytorch_model.bin", "install.sh", "tokenizer/x.pyc", "vae/extra.h5", ".hidden.json"]
)
def test_code_among_the_weights(tampered, name: str) -> None:
    tampered.write(f"weights/{name}", b"{}")
    tampered.redo_manifest()
    assert f"{name} does not belong among weights" in tampered.problems()["the members are those of a submission"]


def test_an_archive_without_videos_says_so(tampered) -> None:
    for role in ("reference", "candidate"):
        for folder in ("videos", "latents", "frames"):
            shutil.rmtree(tampered.root / "runs" / role / folder)
    tampered.redo_checksums()
    from ptq.submission.verify import check_contents

    claims = by_name(check_contents(tampered.contents(), regenerate=False))
    assert not [claim for claim in claims.values() if claim.holds is False]
    assert claims[SHOWN].holds is None and "not in the archive" in claims[SHOWN].found


# Weights and runs.


def test_weights_of_another_checkpoint(tampered) -> None:
    tampered.edit("weights/scheduler/scheduler_config.json", lambda config: config.update(flow_shift=9.0))
    tampered.redo_manifest()
    assert "is of a checkpoint with digest" in tampered.problems()[TOGETHER]


def test_weights_swapped_and_all_digests_with_them(tampered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every digest fits again: only generating a unit tells."""
    from ptq.checkpoint.safetensors_file import read_header

    file = next((tampered.root / "weights/transformer").glob("*.safetensors"))
    entry = next(e for n, e in read_header(file).items() if n.endswith("proj_out.weight") or n.endswith("weight_scale"))
    data = bytearray(file.read_bytes())
    data[entry.start : entry.start + 8] = bytes(8)
    tampered.write(file.relative_to(tampered.root).as_posix(), bytes(data))
    redo_crc(tampered, file)
    tampered.redo_manifest()
    relabel(tampered, "candidate", identify_model("x", tampered.root / "weights").digest)
    redo_all(tampered)
    problems = tampered.problems(regenerate=True)
    assert (
        list(problems) == [UNIT]
        and "of the candidate: final_latents_sha256, saved_frames_sha256, video_sha256 differ" in problems[UNIT]
    )


def redo_crc(tampered, file: Path) -> None:
    from ptq.checkpoint.safetensors_file import tensor_crc32
    from ptq.checkpoint.shards import INDEX_NAME, ShardSet

    shards = ShardSet(file.parent)
    name = (file.parent / INDEX_NAME).relative_to(tampered.root).as_posix()
    fresh = {key: tensor_crc32(shards.read(key)) for key in shards.entries}
    tampered.edit(name, lambda index: index["metadata"].update({"ptq_crc32": fresh}))


def relabel(tampered, role: str, checkpoint: str, **info: Any) -> None:
    """Give a run another checkpoint's digest, everywhere."""

    def run(value: dict[str, Any]) -> None:
        value["checkpoint"]["digest"] = checkpoint
        value["checkpoint"].update(info)
        decisive = {"checkpoint_digest": checkpoint, **{key: value[key] for key in ("dataset", "settings", "versions")}}
        value["digest"] = digest(decisive)

    tampered.edit(f"runs/{role}/run.json", run)
    tampered.edit_lines(f"runs/{role}/{LINES}", lambda lines: [x.update(checkpoint_digest=checkpoint) for x in lines])


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


def test_a_protected_block_that_the_tensors_do_not_show(tampered) -> None:
    config = "weights/transformer/config.json"
    tampered.edit(config, lambda value: value["quantization_config"].update(high_precision_blocks=[0]))
    tampered.edit(MANIFEST, lambda manifest: manifest["high_precision"].append("transformer:0"))
    tampered.redo_manifest()
    assert "the tensors say []" in tampered.problems()["protected blocks are within the budget, from the tensors"]


def test_another_coverage(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["coverage"].update(flop_share=0.999))
    tampered.redo_derived()
    assert "the manifest says flop_share = 0.999" in tampered.problems()["the W4A4 coverage, from the tensors"]


def test_another_original_model(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["base_model"]["configs"].update(transformer="0" * 64))
    assert (
        "not that of the original model"
        in tampered.problems()["format, transform and quantized layers, from the tensors"]
    )


@pytest.mark.parametrize(
    "change",
    [{"hub_id": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"}, {"files": {}}, {"variant": "TI2V-5B"}],
    ids=["hub_id", "files", "variant"],
)
def test_another_original_model_in_words(tampered, change: dict[str, Any]) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["base_model"].update(change))
    tampered.redo_derived()
    assert list(tampered.problems()) == ["the reference run is of the original model"]


def test_another_component_besides_the_experts(tampered) -> None:
    """Generated, evaluated and packed honestly: but then the videos differ by more than the quantized weights."""
    tampered.edit("weights/scheduler/scheduler_config.json", lambda config: config.update(flow_shift=9.0))
    tampered.redo_manifest()
    relabel(tampered, "candidate", identify_model("x", tampered.root / "weights").digest)
    redo_all(tampered)
    problems = tampered.problems()
    assert list(problems) == ["the reference run is of the original model"]
    assert "weights/scheduler/scheduler_config.json is not as in tiny" in next(iter(problems.values()))


@pytest.mark.parametrize("key", ["layers", "blocks", "experts"])
def test_errors_left_out_of_the_manifest(tampered, key: str) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest[key].pop())
    tampered.redo_derived()
    problem = tampered.problems()["format, transform and quantized layers, from the tensors"]
    assert "the manifest lists the errors of" in problem and key in problem


def test_another_statement(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest.update(statement="Certified lossless."))
    tampered.redo_derived()
    assert "'Certified lossless.'" in tampered.problems()["the checkpoint's files have the digests of its manifest"]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("weights/transformer/config.json", {"num_layers": 10**9}, "num_layers = 1e+09"),
        ("weights/transformer/config.json", {"ffn_dim": 10**12}, "ffn_dim = 1e+12"),
        ("weights/text_encoder/config.json", {"num_layers": 10**9}, "num_layers = 1e+09"),
        ("weights/vae/config.json", {"base_dim": 10**15}, "base_dim = 1e+15"),
        ("weights/transformer/config.json", {"num_layers": 5}, '"num_layers": 6, but'),
    ],
    ids=str,
)
def test_numbers_that_would_take_for_ever(tampered, name: str, change: dict[str, Any], reason: str) -> None:
    tampered.edit(name, lambda config: config.update(change))
    tampered.redo_manifest()
    assert any(reason in problem for problem in tampered.problems().values())


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


# Shapes.


@pytest.mark.parametrize(
    "name",
    [
        EVALUATION,
        UNITS,
        "runs/candidate/run.json",
        MANIFEST,
        "submission.json",
        "weights/model_index.json",
        "calibration/calibration.json",
    ],
)
@pytest.mark.parametrize(
    "data",
    [b"null", b'{"candidate": null}', b"[" * 100_000, b"1" * 10_000],
    ids=range(4),
)
def test_malformed_members_are_answers_and_not_tracebacks(tampered, name: str, data: bytes) -> None:
    tampered.write(name, data)
    problems = tampered.problems()
    assert problems and all(len(text) < 3000 for text in problems.values())
