"""The VBench driver under a foreign interpreter: a small stand-in package plays VBench, and plays it badly."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_runs import evaluate_runs, make_run, moving_noise

from ptq.errors import PtqError, UsageError
from ptq.evaluation import VBenchSettings
from ptq.evaluation.suites import get_suite
from ptq.evaluation.vbench.check import missing_weights, probe, required_weights, take_inventory
from ptq.store.files import read_json, read_jsonl

#: Scores depend on the video's bytes and its prompt; `mood.json` says how a dimension misbehaves. It imports nothing.
STAND_IN = """
import hashlib, importlib.util, json, os, sys

assert importlib.util.find_spec("totals") is None, "the driver's own folder is in front of VBench's packages"

class VBench:
    def __init__(self, device, full_info, output_path):
        self.device, self.full_info, self.out = device, full_info, output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        (dimension,) = dimension_list
        assert local and not kwargs and os.path.basename(videos_path) == "videos"
        here = os.path.dirname(os.path.abspath(__file__))
        with open(os.path.join(here, "calls.txt"), "a") as calls:
            calls.write(dimension + "\\n")
        mood = json.load(open(os.path.join(here, "mood.json"))).get(dimension, "")
        names = sorted(os.listdir(videos_path))
        if mode == "custom_input":
            assert set(prompt_list) == set(names), "no prompt map"
        else:
            listed = {e["prompt_en"] for e in json.load(open(self.full_info)) if dimension in e["dimension"]}
            assert {n.rsplit("-", 1)[0] for n in names} <= listed
            prompt_list = {n: n.rsplit("-", 1)[0] for n in names}
        if mood == "crash":
            raise RuntimeError("CUDA out of memory")
        if mood == "kill":
            os.kill(os.getpid(), 9)
        target = os.path.join(self.out, name + "_eval_results.json")
        if mood == "silent":
            return
        if mood == "leave":
            sys.exit(0)
        rows = []
        for video in names:
            data = open(os.path.join(videos_path, video), "rb").read() + prompt_list[video].encode() + dimension.encode()
            score = 0.4 + hashlib.sha256(data).digest()[0] / 1000
            rows.append({"video_path": os.path.join(videos_path, video), "video_results": score})
        if mood == "drop":
            rows = rows[1:]
        if mood == "nan":
            rows[0]["video_results"] = float("nan")
        text = json.dumps({dimension: [0.5, rows]} if mood != "other" else {"elsewhere": [0.5, rows]})
        open(target, "w").write(text[: len(text) // 2] if mood == "partial" else text)
        if mood == "partial":
            os._exit(0)
"""


@pytest.fixture
def vbench(tmp_path, monkeypatch) -> Path:
    """A checkout with the stand-in, and a cache folder with (empty) weights for every dimension."""
    package = tmp_path / "checkout" / "vbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "mood.json").write_text("{}")
    cache = tmp_path / "cache"
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(cache))
    for weight in required_weights(get_suite("vbench").gate, cache):
        weight.path.parent.mkdir(parents=True, exist_ok=True)
        weight.path.write_bytes(b"")
    return package


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    clips = {f"set/p{i}/{k}": moving_noise(2, 32, 32, seed=10 * i + k) for i in range(3) for k in range(2)}
    prompts = {name: f"a prompt of {name.split('/')[1]}" for name in clips}
    return [make_run(folder / name, clips, prompts=prompts) for name in ("ref", "cand")]


def evaluate(runs, vbench, out, suite="icme2026", **options):
    settings = VBenchSettings(options.pop("python", Path(sys.executable)), vbench.parent, "cpu")
    return evaluate_runs(*runs, out, suite=suite, format="hif4", vbench=settings, **options)


def calls(vbench) -> list[str]:
    path = vbench / "calls.txt"
    return path.read_text().split() if path.exists() else []


def test_every_dimension_runs_in_its_own_process_with_prompts(tmp_path, vbench, runs):
    content = evaluate(runs, vbench, tmp_path / "out")
    dimensions = get_suite("icme2026").gate
    assert sorted(calls(vbench)) == sorted([*dimensions, "dynamic_degree"] * 2)
    assert "dynamic_degree" in content["informative"] and "dynamic_degree" not in content["dimensions"]
    assert content["verdict"] == "PASS" and list(content["dimensions"]) == list(dimensions)
    assert content["vbench"]["installation"]["package"] == str(vbench) and content["vbench"]["totals"] is None
    line = read_jsonl(tmp_path / "out" / "units.jsonl")[0]
    video = (runs[0] / "videos" / "set_p0-0.mp4").read_bytes()
    digest = hashlib.sha256(video + b"a prompt of p0" + b"overall_consistency").digest()
    assert line["reference"]["overall_consistency"] == pytest.approx(0.4 + digest[0] / 1000)
    staged = tmp_path / "out" / "vbench" / "reference" / "overall_consistency" / "videos"
    assert sorted(path.name for path in staged.iterdir()) == sorted(p.name for p in (runs[0] / "videos").iterdir())
    assert all(path.is_symlink() for path in staged.iterdir())


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        ("crash", "exit code 1.*CUDA out of memory"), ("kill", "exit code -9"), ("silent", "wrote no result"),
        ("leave", "exit code 0 but no result"), ("partial", "not valid JSON"), ("other", "wrote no result"),
        ("drop", r"scored 5 of 6 videos; set_p0-0\.mp4"), ("nan", r"set_p0-0\.mp4: nan"),
    ],
)  # fmt: skip
def test_a_failing_dimension_is_named_and_the_others_are_kept(tmp_path, vbench, runs, mood, message):
    (vbench / "mood.json").write_text(json.dumps({"imaging_quality": mood}))
    chosen = {"dimensions": ["imaging_quality", "aesthetic_quality"]}
    with pytest.raises(
        PtqError, match=f"(?s)failed for 2 of 4 dimensions.*imaging_quality of the reference.*{message}"
    ):
        evaluate(runs, vbench, tmp_path / "out", **chosen)
    assert not (tmp_path / "out" / "evaluation.json").exists()
    (vbench / "mood.json").write_text("{}")
    (vbench / "calls.txt").unlink()
    assert evaluate(runs, vbench, tmp_path / "out", **chosen)["verdict"] == "PASS"
    assert calls(vbench) == ["imaging_quality", "imaging_quality"]


def test_a_yardstick_is_scored_and_the_reference_is_not_again(tmp_path, vbench, runs):
    clips = {f"set/p{i}/{k}": moving_noise(2, 32, 32, seed=50 + 10 * i + k) for i in range(3) for k in range(2)}
    other = make_run(tmp_path / "fp8", clips, prompts={name: f"a prompt of {name.split('/')[1]}" for name in clips})
    chosen = {"dimensions": ["imaging_quality", "aesthetic_quality"]}
    alone = evaluate(runs, vbench, tmp_path / "alone", **chosen)
    (vbench / "calls.txt").unlink()
    content = evaluate(runs, vbench, tmp_path / "out", yardstick=other, **chosen)
    assert sorted(calls(vbench)) == ["aesthetic_quality"] * 3 + ["imaging_quality"] * 3
    beside = content.pop("yardstick")
    assert content == alone and beside["run"]["directory"] == str(other) and beside["units"] == 6
    assert beside["dimensions"]["imaging_quality"]["relative_loss"]["low"] is not None
    assert beside["dimensions"]["imaging_quality"]["candidate"] != content["dimensions"]["imaging_quality"]["candidate"]
    assert evaluate(runs, vbench, tmp_path / "out", **chosen) == alone and len(calls(vbench)) == 6


def test_kept_results_belong_to_their_inputs(tmp_path, vbench, runs):
    chosen = {"dimensions": ["imaging_quality"]}
    first = evaluate(runs, vbench, tmp_path / "out", **chosen)
    assert len(calls(vbench)) == 2
    assert evaluate(runs, vbench, tmp_path / "out", **chosen) == first and len(calls(vbench)) == 2
    clips = {f"set/p{i}/{k}": moving_noise(2, 32, 32, seed=90 + 10 * i + k) for i in range(3) for k in range(2)}
    other = make_run(tmp_path / "other", clips, prompts={name: f"a prompt of {name.split('/')[1]}" for name in clips})
    changed = evaluate((runs[0], other), vbench, tmp_path / "out", **chosen)
    assert len(calls(vbench)) == 3
    assert changed["dimensions"]["imaging_quality"]["candidate"] != first["dimensions"]["imaging_quality"]["candidate"]
    evaluate((runs[0], other), vbench, tmp_path / "out", fresh=True, **chosen)
    assert len(calls(vbench)) == 5


def test_missing_weights_are_listed_before_anything_runs(tmp_path, vbench, runs):
    (tmp_path / "cache" / "amt_model" / "amt-s.pth").unlink()
    with pytest.raises(PtqError, match=r"amt_model/amt-s\.pth \(from https://huggingface"):
        evaluate(runs, vbench, tmp_path / "out")
    assert not calls(vbench)


def test_weights_table_covers_every_dimension_of_the_presets(tmp_path):
    for suite in ("icme2026", "mlperf-t2v", "vbench", "vbench-i2v"):
        found = take_inventory(suite)
        covered = {weight.dimension for weight in found.weights} | set(found.elsewhere)
        assert set(get_suite(suite).scored) - covered <= {"temporal_flickering"}
    assert take_inventory("tiny") == take_inventory("core") == take_inventory("vbench")
    missing = missing_weights(["overall_consistency", "temporal_style"], tmp_path)
    assert [weight.path.name for weight in missing] == ["ViClip-InternVid-10M-FLT.pth", "bpe_simple_vocab_16e6.txt.gz"]


def test_an_interpreter_without_vbench_is_refused(tmp_path, runs):
    with pytest.raises(UsageError, match=r"no usable VBench.*cannot import vbench"):
        probe(Path(sys.executable), tmp_path)
    with pytest.raises(UsageError, match="is not a program"):
        probe(tmp_path / "python", None)


@pytest.mark.parametrize("body", ["exit 0", "echo broken >&2; exit 3", "kill -9 $$"])
def test_a_fake_interpreter_is_refused(tmp_path, vbench, runs, body):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{body}\n")
    fake.chmod(0o755)
    with pytest.raises(UsageError, match="no usable VBench"):
        evaluate(runs, vbench, tmp_path / "out", python=fake)


def test_the_driver_needs_nothing_of_ours(tmp_path, vbench):
    """Run as VBench's interpreter would: isolated, without this package and its dependencies."""
    from ptq.evaluation.vbench.check import DRIVER

    out = tmp_path / "probe.json"
    command = [sys.executable, "-I", "-S", str(DRIVER), "probe", str(out), str(vbench.parent)]
    subprocess.run(command, check=True, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    assert read_json(out)["package"] == str(vbench)


@pytest.fixture
def benchmark(tmp_path, vbench):
    """Two runs over the stand-in's own prompt list: two prompts for scene, one of them also for color."""
    (vbench / "VBench_full_info.json").write_text(json.dumps([
        {"prompt_en": "alley", "dimension": ["scene"]},
        {"prompt_en": "a red bicycle", "dimension": ["color"]},
        {"prompt_en": "a red bicycle", "dimension": ["scene"]},
    ]))  # fmt: skip
    clips, prompts = {}, {}
    for i, prompt in enumerate(("alley", "a red bicycle", "not in the list")):
        for k in range(2):
            clips[f"vb/{i}/{k}"], prompts[f"vb/{i}/{k}"] = moving_noise(2, 32, 32, seed=i + 5 * k), prompt
    return [make_run(tmp_path / name, clips, prompts=prompts) for name in ("bref", "bcand")]


def test_standard_mode_scores_each_dimension_on_its_own_prompts(tmp_path, vbench, benchmark):
    content = evaluate(benchmark, vbench, tmp_path / "out", suite="vbench", dimensions=["scene", "color"])
    assert {name: d["units"] for name, d in content["dimensions"].items()} == {"scene": 4, "color": 2}
    staged = tmp_path / "out" / "vbench" / "candidate" / "scene" / "videos"
    assert sorted(path.name for path in staged.iterdir()) == [
        "a red bicycle-0.mp4", "a red bicycle-1.mp4", "alley-0.mp4", "alley-1.mp4"
    ]  # fmt: skip
    assert content["vbench"]["totals"] is None


def test_measured_units_are_reused_after_vbench_scored_a_dimension_of_the_same_name(
    tmp_path, vbench, benchmark, monkeypatch
):
    """units.jsonl then has VBench's temporal_flickering, and beside it the one that was measured here."""
    from ptq.evaluation import pairs

    entries = [{"prompt_en": "alley", "dimension": ["temporal_flickering", "scene"]}]
    (vbench / "VBench_full_info.json").write_text(json.dumps(entries))
    core = evaluate_runs(*benchmark, tmp_path / "out", suite="core")
    before = read_jsonl(tmp_path / "out" / "units.jsonl")
    monkeypatch.setattr(pairs, "measure_unit", None)  # nothing is measured again
    for _ in range(2):
        evaluate(benchmark, vbench, tmp_path / "out", suite="vbench", dimensions=["temporal_flickering", "scene"])
        for line, own in zip(read_jsonl(tmp_path / "out" / "units.jsonl"), before, strict=True):
            name, alley = "temporal_flickering", line["unit"].startswith("vb/0")
            assert (line["candidate"][name] != own["candidate"][name]) == alley == ("scene" in line["candidate"])
            kept = {role: {name: own[role][name]} for role in ("reference", "candidate")}
            assert line.get("replaced") == (kept if alley else None)
    assert evaluate_runs(*benchmark, tmp_path / "out", suite="core") == core
    assert read_jsonl(tmp_path / "out" / "units.jsonl") == before


def test_standard_mode_needs_the_benchmarks_prompts(tmp_path, vbench, benchmark):
    with pytest.raises(PtqError, match="No video was made from VBench's prompts for object_class"):
        evaluate(benchmark, vbench, tmp_path / "out", suite="vbench", dimensions=["object_class"])


def test_the_driver_runs_the_image_to_video_package(tmp_path, vbench, benchmark):
    package = vbench.parent / "vbench2_beta_i2v"
    package.mkdir()
    (package / "vbench2_i2v_full_info.json").write_text(
        json.dumps([{"prompt_en": "alley", "dimension": ["i2v_background"], "image_name": "alley.jpg"}])
    )
    (package / "__init__.py").write_text(
        "import json, os\n"
        "from vbench import VBench\n"
        "class VBenchI2V(VBench):\n"
        "    def evaluate(self, videos_path, name, dimension_list=None, local=False, resolution='1-1'):\n"
        "        assert resolution == '1-1' and os.path.basename(self.full_info) == 'vbench2_i2v_full_info.json'\n"
        "        assert os.path.isdir('vbench2_beta_i2v')\n"
        "        rows = [{'video_path': v, 'video_results': 0.5} for v in os.listdir(videos_path)]\n"
        "        with open(os.path.join(self.out, name + '_eval_results.json'), 'w') as out:\n"
        "            json.dump({dimension_list[0]: [0.5, rows]}, out)\n"
    )
    content = evaluate(benchmark, vbench, tmp_path / "out", suite="vbench-i2v", dimensions=["i2v_background"])
    assert content["dimensions"]["i2v_background"]["units"] == 2


def test_prompts_that_cannot_be_file_names_are_refused(tmp_path, vbench):
    prompt = "a road / a river"
    (vbench / "VBench_full_info.json").write_text(json.dumps([{"prompt_en": prompt, "dimension": ["scene"]}]))
    clips = {"vb/0/0": moving_noise(2, 32, 32)}
    pair = [make_run(tmp_path / name, clips, prompts={"vb/0/0": prompt}) for name in ("x", "y")]
    with pytest.raises(PtqError, match="impossible: a road / a river"):
        evaluate(pair, vbench, tmp_path / "out", suite="vbench", dimensions=["scene"])


@pytest.mark.skipif("PTQ_TEST_VBENCH_ENV" not in os.environ, reason="opt-in: names a folder for a VBench environment")
def test_temporal_flickering_equals_the_real_vbench(tmp_path):
    """The same videos through VBench itself (in an environment made here) and the built-in measure, equal to 4e-9."""
    python = Path(os.environ["PTQ_TEST_VBENCH_ENV"]) / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        needs = ["numpy<2", "opencv-python-headless<4.12", "torch", "torchvision", "decord", "pillow", "tqdm"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *needs], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "vbench==0.1.5"], check=True)
    shown = ("In a still frame, a stop sign", "a toilet, frozen in time")
    prompts = {f"vb/{i}/{k}": prompt for i, prompt in enumerate(shown) for k in range(2)}
    clips = {name: moving_noise(9, 64, 96, seed=i) for i, name in enumerate(prompts)}
    pair = [make_run(tmp_path / name, clips, prompts=prompts) for name in ("x", "y")]
    content = evaluate_runs(
        *pair, tmp_path / "out", suite="vbench", format="hif4", dimensions=["temporal_flickering"],
        vbench=VBenchSettings(python, None, "cpu"),
    )  # fmt: skip
    theirs, ours = content["dimensions"]["temporal_flickering"], content["informative"]["temporal_flickering"]
    assert theirs["units"] == 4 and content["vbench"]["installation"]["version"] == "0.1.5"
    lines = read_jsonl(tmp_path / "out" / "units.jsonl")
    assert theirs["reference"] == pytest.approx(ours["reference"], abs=4e-9)
    assert all(0.9 < line["reference"]["temporal_flickering"] < 1 for line in lines)
