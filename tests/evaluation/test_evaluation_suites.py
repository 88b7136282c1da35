"""Whole evaluations of synthetic runs: verdicts, refusals, resume, what lands in the files."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from evaluation_runs import evaluate_runs, make_run, moving_noise, tiny_clips
from PIL import Image
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.evaluation import pairs
from ptq.store.evaluation import read_evaluation
from ptq.store.files import read_json, read_jsonl

COUNT = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Three runs of the tiny world: the original, the same again, and one whose videos belong to other prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    clips, prompts = tiny_clips(COUNT)
    names = list(clips)
    shuffled = {name: clips[names[(i + 5) % COUNT]] for i, name in enumerate(names)}
    latents = {
        name: np.random.default_rng(i).normal(size=(4, 3, 8, 8)).astype(np.float32) for i, name in enumerate(names)
    }
    return {
        "original": make_run(folder / "original", clips, prompts=prompts, latents=latents.__getitem__),
        "again": make_run(folder / "again", clips, prompts=prompts, latents=latents.__getitem__),
        "shuffled": make_run(folder / "shuffled", shuffled, prompts=prompts, info={"checkpoint": {"format": "hif4"}}),
    }


@pytest.mark.parametrize("format", ["hif4", "mxfp4"])
def test_the_original_twice_loses_nothing_and_passes(tiny, tmp_path, format):
    content = evaluate_runs(tiny["original"], tiny["again"], tmp_path / "out", suite="tiny", format=format)
    assert content["verdict"] == "PASS" and content["limit"] == {"hif4": 0.005, "mxfp4": 0.01}[format]
    assert all(value["value"] == value["low"] == value["high"] == 0.0 for value in content["aggregates"].values())
    assert set(content["dimensions"]) == {"colour", "shape", "direction", "temporal_flickering"}
    assert all(d["relative_loss"]["value"] == 0.0 and d["reference"] > 0.9 for d in content["dimensions"].values())
    assert content["units"] == content["prompts"] == COUNT
    assert any("equal the reference's pixel for pixel" in warning for warning in content["warnings"])
    assert content == read_json(tmp_path / "out" / "evaluation.json")


def test_videos_of_other_prompts_fail(tiny, tmp_path):
    content = evaluate_runs(tiny["original"], tiny["shuffled"], tmp_path / "out", suite="tiny")
    assert content["verdict"] == "FAIL" and content["format"] == "hif4"
    assert content["aggregates"]["mean_signed"]["low"] > 0.1
    assert content["informative"]["colour_hit"]["candidate"] < 0.5 < content["informative"]["colour_hit"]["reference"]


def test_a_format_without_a_rule_is_measured_and_not_judged(tiny, tmp_path):
    clips, prompts = tiny_clips(COUNT)
    other = make_run(tmp_path / "int4", clips, prompts=prompts, info={"checkpoint": {"format": "int4"}})
    content = evaluate_runs(tiny["original"], other, tmp_path / "out", suite="tiny", resamples=1000)
    assert (content["format"], content["limit"], content["verdict"]) == ("int4", None, None)
    assert content["aggregates"]["mean_signed"]["value"] == 0.0 and content["dimensions"]["colour"]["units"] == COUNT
    assert any("no limit for this format" in warning for warning in content["warnings"])
    assert read_evaluation(tmp_path / "out").verdict is None
    with pytest.raises(UsageError, match="choose one of hif4, mxfp4"):
        evaluate_runs(tiny["original"], tiny["again"], tmp_path / "out", suite="tiny", format="int4")


def test_a_yardstick_stands_beside_and_changes_nothing(tiny, tmp_path):
    alone = evaluate_runs(tiny["original"], tiny["again"], tmp_path / "a", suite="tiny", format="hif4", resamples=1000)
    options = {"suite": "tiny", "format": "hif4", "resamples": 1000, "yardstick": tiny["shuffled"]}
    content = evaluate_runs(tiny["original"], tiny["again"], tmp_path / "b", **options)
    beside = content.pop("yardstick")
    assert content == alone
    judged = evaluate_runs(tiny["original"], tiny["shuffled"], tmp_path / "c", suite="tiny", resamples=1000)
    for key in ("dimensions", "aggregates", "informative", "paired", "units"):
        assert beside[key] == judged[key], key
    assert beside["run"] == judged["candidate"] and "verdict" not in beside and beside["warnings"] == []
    assert read_evaluation(tmp_path / "b").yardstick.as_json() == beside
    ours, theirs = (read_jsonl(tmp_path / name / "units.jsonl") for name in ("b/yardstick", "c"))
    assert ours == theirs
    runs = ["--reference", str(tiny["original"]), "--candidate", str(tiny["again"]), "--dry-run", "--json"]
    with_it = CliRunner().invoke(app, ["evaluate", *runs, "--yardstick", str(tiny["shuffled"])])
    plans = [json.loads(CliRunner().invoke(app, ["evaluate", *runs]).stdout), json.loads(with_it.stdout)]
    assert plans[1]["seconds"] == 2 * plans[0]["seconds"] and plans[1]["units"] == plans[0]["units"]


def test_a_yardstick_is_paired_as_strictly_and_on_the_same_units(tiny, tmp_path):
    clips, prompts = tiny_clips(COUNT)
    names = list(clips)
    short = make_run(tmp_path / "short", {n: clips[n] for n in names[:-2]}, prompts=prompts)
    other = make_run(tmp_path / "other", clips, prompts=prompts, extra={"seed": 99})
    both = tiny["original"], tiny["again"]
    for yardstick, words in ((short, "--allow-missing"), (other, "the seed differ"), (tmp_path, "no run.json")):
        with pytest.raises(PtqError, match=words):
            evaluate_runs(*both, tmp_path / "out", yardstick=yardstick)
    with pytest.raises(UsageError, match="is one of the runs"):
        evaluate_runs(*both, tiny["shuffled"], yardstick=tiny["shuffled"])
    content = evaluate_runs(*both, tmp_path / "out", yardstick=short, allow_missing=True)
    assert content["units"] == COUNT and content["yardstick"]["units"] == COUNT - 2
    assert content["yardstick"]["warnings"] == [
        f"{COUNT - 2} of {COUNT - 2} yardstick videos equal the reference's pixel for pixel."
    ]


def test_a_removed_video_is_refused_or_left_out_on_request(tiny, tmp_path):
    clips, prompts = tiny_clips(COUNT)
    short = make_run(tmp_path / "short", clips, prompts=prompts)
    next((short / "videos").iterdir()).unlink()
    with pytest.raises(PtqError, match="--allow-missing"):
        evaluate_runs(tiny["original"], short, tmp_path / "out", suite="tiny", format="hif4")
    assert not (tmp_path / "out" / "evaluation.json").exists()
    content = evaluate_runs(tiny["original"], short, tmp_path / "out", suite="tiny", format="hif4", allow_missing=True)
    assert content["units"] == COUNT - 1 and len(content["excluded"]) == 1 and content["verdict"] == "PASS"
    assert "not in the comparison" in content["warnings"][0]


def test_core_has_measures_but_no_verdict(tiny, tmp_path):
    content = evaluate_runs(tiny["original"], tiny["shuffled"], tmp_path / "out")
    assert content["verdict"] is None and content["limit"] is None and not content["dimensions"]
    assert {"psnr", "ssim", "temporal_delta_mae"} <= set(content["paired"])
    assert "never decide the verdict" in content["notes"][0]
    assert content["sources"] == {"decoded video": COUNT}
    lines = read_jsonl(tmp_path / "out" / "units.jsonl")
    assert [line["unit"] for line in lines] == sorted(line["unit"] for line in lines) and len(lines) == COUNT
    mean = np.mean([line["reference"]["temporal_flickering"] for line in lines])
    assert content["informative"]["temporal_flickering"]["reference"] == pytest.approx(mean)


def test_saved_frames_and_latents_are_preferred(tmp_path):
    clip = moving_noise(4, 32, 48)
    other = np.clip(clip.astype(int) + 3, 0, 255).astype(np.uint8)
    latent = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32)
    ref = make_run(tmp_path / "r", {"d/x/0": clip}, save_frames=True, latents=lambda _: latent)
    cand = make_run(tmp_path / "c", {"d/x/0": other}, save_frames=True, latents=lambda _: latent * np.float32(1.1))
    paired = evaluate_runs(ref, cand, tmp_path / "out")["paired"]
    assert paired["psnr"]["mean"] == pytest.approx(10 * np.log10(255**2 / 9), abs=1e-9)
    assert paired["latent_relative_l2"]["mean"] == pytest.approx(0.1, rel=1e-5)
    assert paired["latent_cosine"]["mean"] == pytest.approx(1.0)


def test_finished_units_are_not_measured_again(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = evaluate_runs(tiny["original"], tiny["shuffled"], out, suite="tiny")
    lines = (out / "units.jsonl").read_text().splitlines()
    torn = "\n".join(lines[:10]) + "\n" + lines[10][:50]
    (out / "units.jsonl").write_text(torn)
    measured = []
    measure = pairs.measure_unit
    monkeypatch.setattr(pairs, "measure_unit", lambda *args: measured.append(args[0].name) or measure(*args))
    assert evaluate_runs(tiny["original"], tiny["shuffled"], out, suite="tiny") == first
    assert len(measured) == COUNT - 10
    assert (out / "units.jsonl").read_text().splitlines() == lines
    measured.clear()
    evaluate_runs(tiny["original"], tiny["shuffled"], out, suite="tiny", stride=2)
    assert len(measured) == COUNT
    measured.clear()
    evaluate_runs(tiny["original"], tiny["shuffled"], out, suite="tiny", stride=2, fresh=True)
    assert len(measured) == COUNT


def test_an_edited_video_stops_the_evaluation(tmp_path):
    clip = moving_noise(3, 32, 32)
    ref, cand = make_run(tmp_path / "r", {"d/x/0": clip}), make_run(tmp_path / "c", {"d/x/0": clip})
    video = next((cand / "videos").iterdir())
    video.write_bytes(video.read_bytes() + b"\0")
    with pytest.raises(DamagedFileError, match="sha256 differs"):
        evaluate_runs(ref, cand, tmp_path / "out")


def test_faulty_videos_are_reported(tmp_path):
    good, other = moving_noise(4, 32, 32), moving_noise(4, 32, 32, seed=1)
    frozen, black = good.copy(), good.copy()
    frozen[2:] = frozen[1]
    black[1] = 0
    ref = make_run(tmp_path / "r", {f"d/{n}/0": c for n, c in zip("abcd", (good, other, good, good), strict=True)},
                   save_frames=True)  # fmt: skip
    cand = make_run(tmp_path / "c", {f"d/{n}/0": c for n, c in zip("abcd", (frozen, black, other, other), strict=True)},
                    save_frames=True)  # fmt: skip
    content = evaluate_runs(ref, cand, tmp_path / "out")
    said = " ".join(content["warnings"])
    assert "candidate has 2 frozen frames in 1 videos, for example d/a/0" in said
    assert "candidate has 1 black frames in 1 videos, for example d/b/0" in said
    assert content["duplicates"] == {"reference": [["d/a/0", "d/c/0", "d/d/0"]], "candidate": [["d/c/0", "d/d/0"]]}
    assert "candidate shows the same pixels for different units: d/c/0, d/d/0" in said
    assert "reference has" not in said


@pytest.mark.parametrize("save_frames", [True, False])
def test_a_pasted_first_frame_is_noticed(tmp_path, save_frames):
    image = moving_noise(1, 32, 48, seed=4)[0]
    Image.fromarray(image).save(tmp_path / "input.png")
    drawn = moving_noise(5, 32, 48, seed=4)
    drawn[0] = np.clip(image.astype(int) + np.random.default_rng(0).integers(-12, 13, image.shape), 0, 255)
    pasted = drawn.copy()
    pasted[0] = image
    source = {
        "image": str(tmp_path / "input.png"), "image_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "image_source": {"kind": "image", "frame": 0, "crop": None},
    }  # fmt: skip
    ref = make_run(tmp_path / "r", {"d/x/0": drawn}, save_frames=save_frames, extra=source)
    cand = make_run(tmp_path / "c", {"d/x/0": pasted}, save_frames=save_frames, extra=source)
    content = evaluate_runs(ref, cand, tmp_path / "out")
    line = read_jsonl(tmp_path / "out" / "units.jsonl")[0]
    assert line["reference"]["first_frame_copied"] == 0.0 and 20 < line["reference"]["first_frame_to_image_psnr"] < 40
    if save_frames:
        assert line["candidate"]["first_frame_copied"] == 1.0 and line["candidate"]["first_frame_to_image_psnr"] is None
        assert any("candidate videos is a copy of the input image" in warning for warning in content["warnings"])
    assert 20 < content["paired"]["first_frame_psnr"]["mean"] < 40


def test_other_prompts_are_not_scored_as_the_tiny_world(tmp_path):
    clip = moving_noise(3, 32, 32)
    runs = [make_run(tmp_path / n, {"d/x/0": clip}, prompts={"d/x/0": "a cat on a sofa"}) for n in "rc"]
    with pytest.raises(PtqError, match="d/x/0 is not from the tiny world"):
        evaluate_runs(*runs, tmp_path / "out", suite="tiny", format="hif4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "best"}, "no suite 'best'"), ({"suite": "tiny"}, "does not say which format"),
        ({"suite": "tiny", "format": "int4"}, "int4"), ({"stride": 0}, "--stride"), ({"resamples": 10}, "--bootstrap"),
        ({"suite": "icme2026", "format": "hif4"}, "needs either"), ({"gate": "median"}, "median"),
        ({"dimensions": ["colour"]}, "no dimension colour"),
    ],
)  # fmt: skip
def test_contradictory_requests_are_refused(tiny, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        evaluate_runs(tiny["original"], tiny["again"], tmp_path / "out", **options)


def test_a_looser_limit_than_the_checkpoints_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="generated from a hif4 checkpoint, but --format is mxfp4"):
        evaluate_runs(tiny["original"], tiny["shuffled"], tmp_path / "out", suite="tiny", format="mxfp4")


def test_out_may_not_be_a_run_or_hold_other_files(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out, message in ((tiny["again"], "is one of the runs"), (tmp_path, "holds other files")):
        with pytest.raises(UsageError, match=message):
            evaluate_runs(tiny["original"], tiny["again"], out)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_differing_conditions_that_pairing_allows_are_said(tmp_path):
    clip = moving_noise(3, 32, 32)
    runs = [
        make_run(tmp_path / name, {"d/x/0": clip}, info={"settings": {"dtype": dtype}, "versions": {"torch": "2.13"}})
        for name, dtype in (("r", "bfloat16"), ("c", "float32"))
    ]
    warnings = evaluate_runs(*runs, tmp_path / "out")["warnings"]
    assert "The runs differ in dtype: bfloat16 for the reference, float32 for the candidate." in warnings
    assert not any("torch" in warning for warning in warnings)


def test_one_video_of_a_clip_of_one_frame_has_no_flickering(tmp_path):
    clip = moving_noise(1, 32, 32)
    runs = [make_run(tmp_path / name, {"d/x/0": clip}) for name in "rc"]
    content = evaluate_runs(*runs, tmp_path / "out")
    assert "temporal_flickering" not in content["informative"] and "sharpness" in content["informative"]


def test_evaluation_json_is_strict_json(tiny, tmp_path):
    evaluate_runs(tiny["original"], tiny["again"], tmp_path / "out", suite="tiny", format="hif4")

    def refuse(value):
        raise AssertionError(value)

    json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=refuse)
