"""The page: whole, self-contained, its numbers those of evaluation.json, its videos the run's files."""

from __future__ import annotations

import base64
import re
import shutil

import numpy as np
import pytest
from report_helpers import SETTINGS, UNITS, make_run, page_of
from report_html_reader import Page

from ptq.errors import DamagedFileError
from ptq.evaluation import evaluate_runs
from ptq.report import Sources, videos
from ptq.report.facts import gather
from ptq.report.wording import headline


def rows_of(page: str, table: str) -> list[list[tuple[str, tuple[float, ...]]]]:
    return Page(page).tables[f"table-{table}"][1:]


def interval(estimate: dict) -> tuple[float, ...]:
    return estimate["value"], estimate["low"], estimate["high"]


def test_the_page_parses_and_starts_with_the_verdict(job, page):
    text = Page(page).text
    sentence = headline(gather(Sources(job.evaluation)))
    assert job.content()["verdict"] in sentence and sentence in text
    assert text.index(sentence) < text.index("Loss by dimension")
    assert "never decide the verdict" in text and "no bf16 warm-up steps" in text


def test_nothing_is_fetched(page):
    parsed = Page(page)
    loaded = [v for _, name, v in parsed.attributes if name in ("src", "href", "poster", "data", "action", "srcset")]
    assert loaded and all(value.startswith(("data:", "#")) for value in loaded)
    assert "://" not in page and "@import" not in page and not re.search(r"url\((?!data:)", page)
    policy = next(v for tag, name, v in parsed.attributes if tag == "meta" and name == "content" and "default-src" in v)
    assert "default-src 'none'" in policy and "http" not in policy
    for figure in (v for tag, name, v in parsed.attributes if tag == "img" and name == "src"):
        svg = base64.b64decode(figure.split(",")[1]).decode()
        assert not re.search(r'href="(?!#|data:)', svg) and "url(http" not in svg


def test_every_number_of_the_gate_is_in_the_evaluation(job, page):
    content = job.content()
    names = [name.replace("_", " ") for name in content["dimensions"]]
    assert [row[0][0] for row in rows_of(page, "gate")] == names
    for row, value in zip(rows_of(page, "gate"), content["dimensions"].values(), strict=True):
        expected = [interval(value["relative_loss"]), (value["reference"],), (value["candidate"],)]
        assert [cell[1] for cell in row[1:]] == [*expected, interval(value["points"]), (value["units"],)]
        loss = 100 * value["relative_loss"]["value"]
        shown = row[1][0].split(" %")[0].replace("−", "-")
        assert float(shown) == pytest.approx(loss, abs=0.00501)
    averages = [row[1][1] for row in rows_of(page, "averages")]
    assert averages == [interval(value) for value in content["aggregates"].values()]


def test_a_yardstick_stands_beside_the_candidate(copy_job):
    """Its losses, its warnings and its digests; the verdict, the headline and the other tables stay."""
    before = page_of(copy_job.evaluation, copy_job.checkpoint)
    estimate = {"value": 0.25, "low": 0.125, "high": 0.5}

    def add(content: dict) -> None:
        loss = {name: {**value, "relative_loss": estimate} for name, value in content["dimensions"].items()}
        run = {**content["candidate"], "model": "models/fp8", "checkpoint_digest": "f" * 64}
        content["yardstick"] = {
            **{
                "run": run,
                "units": 20,
                "dimensions": loss,
                "aggregates": dict.fromkeys(content["aggregates"], estimate),
            },
            **{"paired": content["paired"], "warnings": ["The runs differ in dtype."]},
        }

    copy_job.edit(add)
    page, content = page_of(copy_job.evaluation, copy_job.checkpoint), copy_job.content()
    rows = rows_of(page, "yardstick")
    values = [*(one["relative_loss"] for one in content["dimensions"].values()), *content["aggregates"].values()]
    assert [row[1][1] for row in rows[: len(values)]] == [interval(value) for value in values]
    assert {row[2][1] for row in rows[: len(values)]} == {interval(estimate)}
    assert rows[-1][1][1] == rows[-1][2][1] == (content["paired"]["ssim"]["mean"],)
    text = Page(page).text
    assert "Beside a yardstick: models/fp8" in text and "the yardstick on 20 videos" in text
    assert "Of the yardstick: The runs differ in dtype." in text and "f" * 64 in text
    assert "The yardstick's run was made elsewhere" in text
    for table in ("gate", "averages", "measures", "drift"):
        assert rows_of(page, table) == rows_of(before, table)


def test_settings_of_runs_that_differ_have_a_column_each(copy_job):
    assert [len(row) for row in rows_of(page_of(copy_job.evaluation), "settings")[:1]] == [2]
    copy_job.edit(lambda content: content["candidate"]["settings"].update(cache="first-block:0.1"))
    rows = {row[0][0]: [cell[0] for cell in row[1:]] for row in rows_of(page_of(copy_job.evaluation), "settings")}
    assert rows["cache"] == ["default", "first-block:0.1"] and rows["steps"] == ["4", "4"]


def test_every_other_number_is_in_the_artifacts(job, page):
    content = job.content()
    for row, value in zip(rows_of(page, "measures"), content["informative"].values(), strict=True):
        assert (row[2][1], row[3][1]) == ((value["reference"],), (value["candidate"],))
        assert row[1][1] == (() if value["relative_loss"] is None else interval(value["relative_loss"]))
    for row, value in zip(rows_of(page, "drift"), content["paired"].values(), strict=True):
        assert [cell[1] for cell in row[1:]] == [(value[key],) for key in ("mean", "min", "max", "units")]
    manifest = gather(Sources(job.evaluation)).manifest
    assert [(r[0][0], r[1][1]) for r in rows_of(page, "experts")] == [
        (e.expert, (e.denoiser_error,)) for e in manifest.experts
    ]
    errors = {f"{b.expert}:{b.block}": (b.stream_error,) for b in manifest.blocks}
    assert {row[0][0]: row[1][1] for row in rows_of(page, "blocks")} == errors
    size = {row[0][0]: row[1][1] for row in rows_of(page, "size")}
    assert size["these values packed"] == (manifest.coverage.quantized_bytes,)
    assert size["share of Linear FLOPs in W4A4"] == (manifest.coverage.flop_share,)


def test_videos_are_the_files_and_are_spread_over_the_drift(job, page):
    sources = [v for tag, name, v in Page(page).attributes if tag == "video" and name == "src"]
    assert len(sources) == 3 * 6
    facts = gather(Sources(job.evaluation))
    chosen = [pair for pair, _ in videos.choose_units(facts, 6)]
    for index, pair in enumerate(chosen):
        for side, unit in enumerate(pair):
            assert base64.b64decode(sources[3 * index + side].split(",")[1]) == unit.video.read_bytes()
    ssim = {line.unit: line.paired["ssim"] for line in facts.units}
    drawn = [ssim[pair[0].name] for pair in chosen]
    assert drawn == sorted(drawn) and drawn[0] == min(ssim.values()) and drawn[-1] == max(ssim.values())
    assert len(videos.choose_units(facts, 1)) == 1 and len(videos.choose_units(facts, 100)) == UNITS


def test_the_difference_video_shows_the_amplified_difference(job, tmp_path):
    from ptq.evaluation.frames import VIDEO, frames_of, iterate_video

    clip = videos.make_clips(gather(Sources(job.evaluation)), 1)[0]
    (tmp_path / "d.mp4").write_bytes(next(movie.mp4 for movie in clip.movies if movie.role == "difference"))
    shown = np.stack(list(iterate_video(tmp_path / "d.mp4"))).astype(float)
    pair = next(pair for pair in gather(Sources(job.evaluation)).pairs if pair[0].name == clip.unit)
    ours, theirs = (np.stack(list(frames_of(unit, VIDEO))).astype(float) for unit in pair)
    expected = np.minimum(np.abs(ours - theirs) * videos.AMPLIFY, 255)
    assert shown.shape == expected.shape and shown.mean() == pytest.approx(expected.mean(), rel=0.1)


def test_large_videos_become_stated_previews(job, monkeypatch):
    facts = gather(Sources(job.evaluation))
    monkeypatch.setattr(videos, "BUDGET_BYTES", 1000)
    clips = videos.make_clips(facts, 3)
    assert len(clips) == 1 and clips[0].preview
    originals = [unit.video.read_bytes() for unit in videos.choose_units(facts, 3)[0][0]]
    assert clips[0].movies[0].mp4 not in originals
    from ptq.report.html import build_html

    assert "re-encoded previews" in build_html(facts, clips).decode()


def test_an_exchanged_video_is_refused(copy_job):
    video = next((copy_job.run("candidate") / "videos").iterdir())
    shutil.copy(next((copy_job.run("reference") / "videos").glob("*12*")), video)
    with pytest.raises(DamagedFileError, match="sha256 differs"):
        videos.make_clips(gather(Sources(copy_job.evaluation)), UNITS)


def test_words_of_prompts_cannot_become_markup(tmp_path):
    hostile = '<script>alert(1)</script> </video> "quoted" {{ 7 * 7 }} & <b>'
    rng = np.random.default_rng(0)
    frames = {f"d/{i}/0": rng.integers(0, 255, (3, 32, 32, 3)).astype(np.uint8) for i in range(2)}
    runs = [
        make_run(tmp_path / n, frames, prompts=dict.fromkeys(frames, hostile), info={"settings": SETTINGS})
        for n in "ab"
    ]
    evaluate_runs(*runs, tmp_path / "out", suite="core")
    page = page_of(tmp_path / "out")
    assert hostile in Page(page).text and page.count("<script>") == 1
    assert "NO VERDICT" in page and "never decide" in page and "--checkpoint" in page


def test_missing_videos_are_stated(copy_job):
    shutil.rmtree(copy_job.run("reference"))
    page = page_of(copy_job.evaluation)
    assert "no videos in this report" in page and "<video" not in page and "pass --reference" in page


def test_same_artifacts_same_bytes(job, page):
    assert page_of(job.evaluation, job.checkpoint) == page


def test_every_table_has_its_place_in_both_outputs(job, page):
    from ptq.report.html import all_tables, read_template

    tables = all_tables(gather(Sources(job.evaluation)))
    assert {f"table-{key}" for key in tables} == set(Page(page).tables)
    template = read_template("report.typ")
    assert all(f'"{key}"' in template for key in tables)
