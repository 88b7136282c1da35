"""The organisers' and VBench's own files, where a checkout has them beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq.prompts import fit_image, load_image, read_prompts, require_media

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MM = DATA / "opens2v" / "OpenS2V-5M_to_mm.json"
VIDEOS = DATA / "opens2v" / "videos"
EVAL = DATA / "opens2v" / "eval"

pytestmark = pytest.mark.skipif(not MM.exists(), reason="the real prompt files are not beside this checkout")


def test_opens2v_mm_and_its_clips() -> None:
    prompts = read_prompts(MM, media_root=[VIDEOS])
    assert (prompts.format, prompts.records, len(prompts.samples)) == ("opens2v-mm", 1000, 1000)
    lengths = [len(sample.prompt) for sample in prompts.samples]
    assert (min(lengths), max(lengths)) == (436, 1929)
    entries = json.loads(MM.read_text())
    assert [one.prompt for one in prompts.samples] == [entry["cap"].strip() for entry in entries]
    present = require_media(prompts, skip_missing=True)
    assert len(present) == len(list(VIDEOS.rglob("*.mp4"))) == 8
    for sample in present:
        assert sample.media.resolved.stem == sample.id
        frame = load_image(sample.media)
        assert frame.ndim == 3
        assert frame.std() > 5
        assert fit_image(frame, 480, 832).shape == (480, 832, 3)


@pytest.mark.parametrize(
    ("name", "count", "several"), [("Open-Domain", 180, 90), ("Human-Domain", 60, 0), ("SingleObject", 30, 0)]
)
def test_opens2v_eval(name: str, count: int, several: int) -> None:
    prompts = read_prompts(EVAL / f"{name}_Eval.json")
    assert (prompts.format, len(prompts.samples)) == ("opens2v-eval", count)
    assert all(sample.id.startswith(f"{name}/") for sample in prompts.samples)
    assert sum(sample.extra["references"] > 1 for sample in prompts.samples) == several


def test_eval_sets_overlap_but_calibration_captions_do_not() -> None:
    open_domain, single = (read_prompts(EVAL / f"{name}_Eval.json") for name in ("Open-Domain", "SingleObject"))
    assert not {one.id for one in single.samples} & {one.id for one in open_domain.samples}
    assert len(single.samples) == 30
    assert len(read_prompts(open_domain.path, exclude=single.path).samples) == 150
    assert read_prompts(MM, exclude=open_domain.path).excluded == 0


def test_native_sample() -> None:
    prompts = read_prompts(DATA / "opens2v" / "native" / "total_part_sample.json")
    (sample,) = prompts.samples
    assert (prompts.format, sample.extra) == ("opens2v-5m", {"caption": "face_cap_qwen"})
    assert sample.prompt.startswith("The video features three individuals")
    assert (sample.media.frame, sample.media.crop) == (0, (0, 1280, 0, 720))


def test_vbench() -> None:
    prompts = read_prompts(DATA / "vbench" / "VBench_full_info.json")
    assert (prompts.format, prompts.records, len(prompts.samples)) == ("vbench", 946, 944)
    bund = next(one for one in prompts.samples if one.id == "The bund Shanghai, oil painting")
    assert bund.extra["dimension"] == [
        "appearance_style",
        "overall_consistency",
        "aesthetic_quality",
        "imaging_quality",
    ]
    i2v = read_prompts(DATA / "vbench" / "vbench2_i2v_full_info.json")
    assert (i2v.format, len(i2v.samples), len({one.media.path for one in i2v.samples})) == ("vbench-i2v", 1118, 355)
