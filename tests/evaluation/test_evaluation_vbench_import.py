"""VBench result files: every shape, every reason to refuse one, and the gate on imported scores."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import evaluate_imported, evaluate_runs, make_run, moving_noise

from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.evaluation.findings import settings_warnings
from ptq.evaluation.runs import read_run
from ptq.evaluation.scores import Scores
from ptq.evaluation.suites import get_suite
from ptq.evaluation.vbench.results import parse_results
from ptq.evaluation.vbench.totals import covers_benchmark, published_totals, total
from ptq.store.files import read_jsonl

GOLDEN = Path(__file__).parent / "data" / "vbench_eval_results.json"
ICME = get_suite("icme2026").gate
VIDEOS = [f"p{i:02d}-{k}.mp4" for i in range(30) for k in range(2)]


def results(seed=0, loss=0.0, videos=VIDEOS, dimensions=ICME):
    """A result file's content; `loss` lowers every score by that share."""
    table = {}
    for index, name in enumerate(dimensions):
        scores = np.random.default_rng(index).uniform(0.4, 0.9, len(VIDEOS)) * (1 - loss)
        scores = scores + np.random.default_rng([seed, index]).normal(0, 1e-3, len(VIDEOS)) * (seed > 0)
        scale = 100 if name == "imaging_quality" else 1
        rows = [
            {"video_path": f"/data/{video}", "video_results": float(scores[VIDEOS.index(video)] * scale)}
            for video in videos
        ]
        table[name] = [sum(row["video_results"] for row in rows) / len(rows) / scale, rows]
    return table


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_golden_file_with_every_shape():
    parsed = parse_results(json.loads(GOLDEN.read_text()), "golden")
    assert parsed["camera_motion"].rows == {
        "a road, camera pans left-0.mp4": 1.0, "a road, camera zooms in-0.mp4": 0.0
    }  # fmt: skip
    assert parsed["dynamic_degree"].rows == {"a cat-0.mp4": 1.0, "a cat-1.mp4": 0.0}
    assert parsed["imaging_quality"].rows["a cat-0.mp4"] == pytest.approx(0.6912)
    assert parsed["imaging_quality"].score == pytest.approx(np.mean(list(parsed["imaging_quality"].rows.values())))
    assert parsed["subject_consistency"].rows["a cat-1.mp4"] == 0.91


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [], "expected an object"), (lambda d: {}, "expected an object"),
        (lambda d: {**d, "dynamic_degree": [0.5]}, "dynamic_degree: expected"),
        (lambda d: {**d, "dynamic_degree": [0.5, []]}, "no rows"),
        (lambda d: {**d, "dynamic_degree": [math.nan, [{"video_path": "a.mp4", "video_results": 1}]]}, "score: nan"),
        (lambda d: {**d, "dynamic_degree": [0.5, [{"video_path": "a.mp4", "video_results": math.nan}]]}, "a.mp4: nan"),
        (lambda d: {**d, "dynamic_degree": [0.5, [{"video_path": "a.mp4", "video_results": None}]]}, "a.mp4: None"),
        (lambda d: {**d, "dynamic_degree": [0.5, [{"video_path": "a.mp4", "video_results": [1]}]]}, "not a finite"),
        (lambda d: {**d, "dynamic_degree": [0.5, [{"video": "a.mp4"}]]}, "row 1"),
        (lambda d: {**d, "dynamic_degree": [1, [{"video_path": f"/{i}/a.mp4", "video_results": 1} for i in "xy"]]}, "twice"),
    ],
)  # fmt: skip
def test_other_shapes_are_refused(change, message):
    with pytest.raises(DamagedFileError, match=message):
        parse_results(change(json.loads(GOLDEN.read_text())), "golden")


def test_imported_files_are_judged(tmp_path):
    ref = write(tmp_path / "ref.json", results())
    for name, loss, verdict in (("same", 0.0, "PASS"), ("small", 0.004, "PASS"), ("large", 0.02, "FAIL")):
        cand = write(tmp_path / f"{name}.json", results(seed=1, loss=loss))
        content = evaluate_imported(ref, cand, tmp_path / name, format="hif4")
        assert content["verdict"] == verdict
        assert content["aggregates"]["mean_signed"]["value"] == pytest.approx(loss, abs=1e-3)
        assert content["prompts"] == 30 and content["units"] == 60
        assert content["dimensions"]["imaging_quality"]["reference"] < 1
        assert "no manifest proves" in content["warnings"][0]
        lines = read_jsonl(tmp_path / name / "units.jsonl")
        assert len(lines) == 60 and set(lines[0]["reference"]) == set(ICME)


def test_two_samples_of_a_prompt_are_one_cluster(tmp_path):
    ref, cand = write(tmp_path / "r.json", results()), write(tmp_path / "c.json", results(seed=1))
    assert evaluate_imported(ref, cand, tmp_path / "out", format="hif4")["prompts"] == 30


def test_rows_missing_in_one_file_are_refused_or_left_out(tmp_path):
    ref, short = write(tmp_path / "r.json", results()), write(tmp_path / "c.json", results(videos=VIDEOS[:-3]))
    with pytest.raises(PtqError, match="3 of 60 videos have no score"):
        evaluate_imported(ref, short, tmp_path / "out", format="hif4")
    content = evaluate_imported(ref, short, tmp_path / "out", format="hif4", allow_missing=True)
    assert content["dimensions"]["imaging_quality"]["units"] == 57 and content["verdict"] == "PASS"
    assert any("3 of 60 videos left out" in warning for warning in content["warnings"])


def test_missing_dimensions_are_named_and_a_subset_can_be_chosen(tmp_path):
    ref = write(tmp_path / "r.json", results(dimensions=ICME[:2]))
    with pytest.raises(PtqError, match="lacks overall_consistency"):
        evaluate_imported(ref, ref, tmp_path / "out", format="hif4")
    content = evaluate_imported(ref, ref, tmp_path / "out", format="hif4", dimensions=ICME[:2])
    assert list(content["dimensions"]) == list(ICME[:2])
    with pytest.raises(UsageError, match="no dimension beauty"):
        evaluate_imported(ref, ref, tmp_path / "out", format="hif4", dimensions=["beauty"])


def test_scores_come_from_the_rows_and_a_differing_total_is_said(tmp_path):
    edited = results()
    edited["aesthetic_quality"][0] = 0.99
    ref, cand = write(tmp_path / "r.json", results()), write(tmp_path / "c.json", edited)
    content = evaluate_imported(ref, cand, tmp_path / "out", format="hif4")
    assert content["dimensions"]["aesthetic_quality"]["relative_loss"]["value"] == 0.0
    assert any("VBench reports 0.9900" in warning for warning in content["warnings"])


def test_nan_in_one_row_is_refused(tmp_path):
    broken = results()
    broken["motion_smoothness"][1][4]["video_results"] = math.nan
    ref, cand = write(tmp_path / "r.json", results()), write(tmp_path / "c.json", broken)
    with pytest.raises(DamagedFileError, match=r"motion_smoothness, p02-0\.mp4: nan"):
        evaluate_imported(ref, cand, tmp_path / "out", format="hif4", allow_missing=True)


def test_color_keeps_the_common_rows_and_says_so(tmp_path):
    """VBench's color leaves out videos in which it finds no object; that is no missing data."""
    full, fewer = results(dimensions=["color"]), results(dimensions=["color"], videos=VIDEOS[4:])
    ref, cand = write(tmp_path / "r.json", full), write(tmp_path / "c.json", fewer)
    content = evaluate_imported(ref, cand, tmp_path / "out", suite="vbench", format="hif4", dimensions=["color"])
    assert content["dimensions"]["color"]["units"] == 56
    assert any("60 of the reference, 56 of the candidate, 56 in both" in warning for warning in content["warnings"])


def test_cancelling_gains_are_reported(tmp_path):
    mixed = copy.deepcopy(results())
    for name, factor in (("imaging_quality", 0.9), ("aesthetic_quality", 1.1)):
        for row in mixed[name][1]:
            row["video_results"] *= factor
    ref, cand = write(tmp_path / "r.json", results()), write(tmp_path / "c.json", mixed)
    content = evaluate_imported(ref, cand, tmp_path / "out", format="hif4")
    assert content["verdict"] == "PASS"
    assert any("gains cancel losses" in warning and "imaging_quality" in warning for warning in content["warnings"])
    strict = evaluate_imported(ref, cand, tmp_path / "out", format="hif4", gate="mean_positive")
    assert strict["verdict"] == "FAIL"


@pytest.fixture
def runs(tmp_path):
    clips = {f"set/p{i}/0": moving_noise(2, 32, 32, seed=i) for i in range(3)}
    return [make_run(tmp_path / name, clips) for name in ("ref", "cand")]


def run_rows(names):
    return {name: [0.5, [{"video_path": f"/x/{v}", "video_results": 0.5 * (100 if name == "imaging_quality" else 1)}
                         for v in names]] for name in ICME}  # fmt: skip


def test_rows_are_matched_to_the_runs_and_must_be_complete(tmp_path, runs):
    names = [f"set_p{i}-0.mp4" for i in range(3)]
    full = write(tmp_path / "full.json", run_rows(names))
    content = evaluate_runs(*runs, tmp_path / "out", suite="icme2026", format="hif4", import_vbench=(full, full))
    assert content["dimensions"]["motion_smoothness"]["units"] == 3 and "ssim" in content["paired"]
    assert read_jsonl(tmp_path / "out" / "units.jsonl")[0]["reference"]["imaging_quality"] == 0.5
    told = [text for text in content["warnings"] if "settings of suite icme2026" in text]
    assert len(told) == 1 and "width not given (there 1280)" in told[0]
    # Missing in both files: only the manifest knows.
    short = write(tmp_path / "short.json", run_rows(names[:2]))
    with pytest.raises(PtqError, match="set/p2/0"):
        evaluate_runs(*runs, tmp_path / "out", suite="icme2026", format="hif4", import_vbench=(short, short))
    strange = write(tmp_path / "strange.json", run_rows([*names, "other.mp4"]))
    with pytest.raises(PtqError, match=r"not in the run \(other\.mp4\)"):
        evaluate_runs(*runs, tmp_path / "out", suite="icme2026", format="hif4", import_vbench=(full, strange))


def test_a_run_of_the_challenges_geometry_needs_no_word(tmp_path, runs):
    suite, info = get_suite("icme2026"), read_run(runs[1]).info
    assert suite.settings == {"image_to_video": True, "width": 1280, "height": 720, "num_frames": 61, "fps": 16}
    same = info.model_copy(update={"settings": dict(suite.settings)})
    assert settings_warnings(suite, same) == [] == settings_warnings(get_suite("vbench"), info)
    other = info.model_copy(update={"settings": {**suite.settings, "num_frames": 81}})
    assert "icme2026: num_frames 81 (there 61)." in settings_warnings(suite, other)[0]


def test_the_settings_of_mlperf(runs):
    suite, info = get_suite("mlperf-t2v"), read_run(runs[1]).info
    wanted = {
        **{"width": 1280, "height": 720, "num_frames": 81, "fps": 16, "steps": 20, "image_to_video": False},
        **{"guidance_scale": 4.0, "guidance_scale_2": 3.0, "seed": 42, "seed_scheme": "same"},
    }
    assert suite.settings == {**wanted, "fixed_latent": "any"} and suite.mark.needed == 69.7752
    same = info.model_copy(update={"settings": {**wanted, "fixed_latent": "a" * 64}})
    assert settings_warnings(suite, same) == []
    (told,) = settings_warnings(suite, info.model_copy(update={"settings": {**wanted, "seed_scheme": "vbench"}}))
    assert "seed_scheme vbench (there same), fixed_latent not given (there any)." in told


def test_dynamic_degree_stands_beside_the_verdict(tmp_path):
    """A candidate that freezes passes, and the evaluation shows what became of its motion."""
    still = results()
    for row in (moving := results(dimensions=[*ICME, "dynamic_degree"]))["dynamic_degree"][1]:
        row["video_results"] = True
    moving["dynamic_degree"][0] = 1.0
    still["dynamic_degree"] = [
        0.5,
        [{**row, "video_results": i % 2 == 0} for i, row in enumerate(moving["dynamic_degree"][1])],
    ]
    ref, cand = write(tmp_path / "r.json", moving), write(tmp_path / "c.json", still)
    content = evaluate_imported(ref, cand, tmp_path / "out", format="hif4")
    assert content["verdict"] == "PASS" and list(content["dimensions"]) == list(ICME)
    beside = content["informative"]["dynamic_degree"]
    assert (beside["reference"], beside["candidate"], beside["relative_loss"]["value"]) == (1.0, 0.5, 0.5)
    assert read_jsonl(tmp_path / "out" / "units.jsonl")[0]["candidate"]["dynamic_degree"] in (0.0, 1.0)
    assert not any("dynamic_degree" in text for text in content["warnings"])
    named = [*ICME, "dynamic_degree"]
    assert (
        evaluate_imported(ref, cand, tmp_path / "named", format="hif4", dimensions=named)["informative"]
        == content["informative"]
    )
    for options, files in (
        ({}, (write(tmp_path / "old.json", results()),) * 2),
        ({"dimensions": list(ICME)}, (ref, cand)),
    ):
        without = evaluate_imported(*files, tmp_path / "without", format="hif4", **options)
        assert without["informative"] == {} and without["aggregates"].keys() == content["aggregates"].keys()
        assert any("dynamic_degree was not scored" in text for text in without["warnings"])
    with pytest.raises(UsageError, match="dynamic_degree stands beside the verdict of suite icme2026"):
        evaluate_imported(ref, cand, tmp_path / "none", format="hif4", dimensions=["dynamic_degree"])


def test_prompts_longer_than_viclip_reads_are_counted(tmp_path):
    short, long = " ".join(["word"] * 30), " ".join(["word"] * 31)
    table = {
        name: [0.5, [{"video_path": f"{text}-0.mp4", "video_results": 0.5} for text in (short, long)]] for name in ICME
    }
    file = write(tmp_path / "r.json", table)
    (told,) = [
        text for text in evaluate_imported(file, file, tmp_path / "a", format="hif4")["warnings"] if "32 tokens" in text
    ]
    assert told.startswith("1 of 2 prompts have more than 30 words, and overall_consistency reads 32 tokens")
    left = evaluate_imported(file, file, tmp_path / "b", format="hif4", dimensions=ICME[:2])["warnings"]
    assert not any("tokens" in text for text in left)


def test_totals_of_extreme_rows():
    """Best scores give 1, worst 0; dynamic_degree and camera_motion count with their published weights."""
    suite = get_suite("vbench")
    perfect = {name: high for name, (_, high, _, _) in suite.normalization.items()}
    assert total(suite, perfect) == pytest.approx({"quality": 1.0, "semantic": 1.0, "total": 1.0})
    still = {**perfect, "dynamic_degree": 0.0}
    assert total(suite, still)["quality"] == pytest.approx(6 / 6.5)
    assert total(suite, still)["total"] == pytest.approx((4 * 6 / 6.5 + 1) / 5)
    worst = {name: low for name, (low, _, _, _) in suite.normalization.items()}
    assert total(suite, worst)["total"] == pytest.approx(0.0)
    i2v = get_suite("vbench-i2v")
    shaky = {name: high for name, (_, high, _, _) in i2v.normalization.items()} | {"camera_motion": 0.0}
    assert total(i2v, shaky) == pytest.approx({"i2v": 2 / 2.1, "quality": 1.0, "total": (2 / 2.1 + 1) / 2})


def test_totals_of_a_published_model():
    """LaVie on the VBench leaderboard: its dimensions, and the quality, semantic and total scores published for them."""
    published = {
        "subject_consistency": 91.41, "background_consistency": 97.47, "temporal_flickering": 98.30,
        "motion_smoothness": 96.38, "dynamic_degree": 49.72, "aesthetic_quality": 54.94, "imaging_quality": 61.90,
        "object_class": 91.82, "multiple_objects": 33.32, "human_action": 96.80, "color": 86.39,
        "spatial_relationship": 34.09, "scene": 52.69, "appearance_style": 23.56, "temporal_style": 25.93,
        "overall_consistency": 26.41,
    }  # fmt: skip
    found = total(get_suite("vbench"), {name: value / 100 for name, value in published.items()})
    assert {name: round(100 * value, 2) for name, value in found.items()} == {
        "quality": 78.78, "semantic": 70.31, "total": 77.08
    }  # fmt: skip


def test_totals_need_the_full_benchmark():
    suite = get_suite("vbench")
    rows = {name: {f"{name}/{i}-{k}": 0.5 for i in range(suite.prompts[name]) for k in range(5)} for name in suite.gate}
    clusters = {unit: unit.rsplit("-", 1)[0] for table in rows.values() for unit in table}
    scores = Scores(rows, copy.deepcopy(rows), clusters)
    assert covers_benchmark(suite, scores) and published_totals(suite, scores)["reference"]["total"] > 0
    rows["scene"].popitem()
    assert published_totals(suite, scores) is None
    assert published_totals(suite.narrowed(["scene"]), scores) is None
    assert published_totals(get_suite("icme2026"), scores) is None


def test_the_mark_of_mlperf_is_the_plain_mean_over_all_its_prompts(tmp_path):
    """248 prompts of one video: every dimension on its own prompts, 99 % of 70.48 is enough."""
    suite = get_suite("mlperf-t2v")
    groups = {
        "subject_consistency": "s",
        "motion_smoothness": "s",
        "dynamic_degree": "s",
        "background_consistency": "b",
        "scene": "b",
        "appearance_style": "a",
    }
    assert (
        set(groups) == set(suite.gate)
        and sum(suite.prompts[n] for n in ("subject_consistency", "scene", "appearance_style")) == 248
    )

    def table(score: float) -> dict:
        return {
            name: [
                score,
                [
                    {"video_path": f"{groups[name]}{i}-0.mp4", "video_results": score}
                    for i in range(suite.prompts[name])
                ],
            ]
            for name in suite.gate
        }

    ref = write(tmp_path / "r.json", table(0.7048))
    for score, reached in ((0.697753, True), (0.69775, False)):
        cand = write(tmp_path / "c.json", table(score))
        content = evaluate_imported(ref, cand, tmp_path / "out", suite="mlperf-t2v", format="mxfp4")
        totals, mark = content["vbench"]["totals"], content["vbench"]["mark"]
        assert totals["reference"]["plain mean, percent"] == pytest.approx(70.48)
        assert mark == {
            "published": 70.48,
            "share": 0.99,
            "needed": 69.7752,
            "score": pytest.approx(100 * score),
            "reached": reached,
        }
        assert (
            content["verdict"] == ("PASS" if reached else "FAIL") and content["prompts"] == 248
        )  # of the limit of 1 %
    fewer = table(0.7)
    fewer["scene"][1].pop()
    content = evaluate_imported(
        *[write(tmp_path / "f.json", fewer)] * 2, tmp_path / "f", suite="mlperf-t2v", format="mxfp4"
    )
    assert content["vbench"]["totals"] is content["vbench"]["mark"] is None
    assert any(
        "(69.7752, 99% of 70.48) is of all its dimensions on all their prompts" in text for text in content["warnings"]
    )
