"""Reading generation directories and refusing unfair comparisons."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluation_runs import edit_manifest, evaluate_runs, make_run, tiny_clips

from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.evaluation.findings import allowed_differences, condition_warnings
from ptq.evaluation.runs import PAIRED_KEYS, pair_runs, read_run, verify_video
from ptq.report.facts import gather
from ptq.report.html import content
from ptq.report.locate import Sources
from ptq.report.reproduce import reproduction
from ptq.report.wording import limitations
from ptq.wan.card import _measured

CLIPS = {f"set/{name}/{k}": np.full((2, 16, 16, 3), 40 * k + 20, np.uint8) for name in ("a", "b") for k in (0, 1)}


@pytest.fixture
def runs(tmp_path):
    return make_run(tmp_path / "ref", CLIPS), make_run(tmp_path / "cand", CLIPS)


def pair(runs, **options):
    return pair_runs(read_run(runs[0]), read_run(runs[1]), **options)


def test_units_pair_by_name_and_know_their_prompt(runs):
    pairing = pair(runs)
    assert [ours.name for ours, _ in pairing.pairs] == sorted(CLIPS) and not pairing.excluded
    assert all(ours.name == theirs.name and ours.directory != theirs.directory for ours, theirs in pairing.pairs)
    assert {ours.cluster for ours, _ in pairing.pairs} == {"set/a", "set/b"}


def test_last_line_of_a_unit_wins(runs):
    manifest = runs[0] / "manifest-0of1.jsonl"
    first = json.loads(manifest.read_text().splitlines()[0])
    with open(manifest, "a") as handle:
        handle.write(json.dumps({**first, "seed": 77}) + "\n")
    assert read_run(runs[0]).units[first["unit"]].line.seed == 77
    with open(manifest, "a") as handle:
        handle.write(json.dumps({"unit": first["unit"], "status": "failed", "error": "NaN latents"}) + "\n")
    assert "NaN latents" in read_run(runs[0]).unusable[first["unit"]]


def test_a_failure_in_one_shard_does_not_hide_success_in_another(runs):
    for shard in ("0of2", "1of2"):
        (runs[0] / f"manifest-{shard}.jsonl").write_text(
            json.dumps({"unit": "set/a/0", "status": "failed", "error": "out of memory"}) + "\n"
        )
    assert "set/a/0" in read_run(runs[0]).units


CACHE = {"settings": {"cache": "first-block:0.1"}}


def test_runs_pair_only_with_the_same_cache_unless_the_difference_is_named(tmp_path):
    plain, none = (
        make_run(tmp_path / "plain", CLIPS),
        make_run(tmp_path / "none", CLIPS, info={"settings": {"cache": None}}),
    )
    one, two = (make_run(tmp_path / name, CLIPS, info=CACHE) for name in ("one", "two"))
    other = make_run(tmp_path / "other", CLIPS, info={"settings": {"cache": "first-block:0.2"}})
    assert (
        len(pair((plain, none)).pairs) == len(pair((one, two)).pairs) == 4
    )  # made before there were caches, and after
    for runs in ((plain, one), (one, none), (one, other)):
        with pytest.raises(PtqError, match=r"cache is .*first-block:0\.1.*--allow-difference cache") as raised:
            pair(runs, allow_missing=True)
        assert "\n" not in str(raised.value)
        assert len(pair(runs, allow_differences=["cache"]).pairs) == 4
    with pytest.raises(UsageError, match="takes cache, attention-backend, found 'dtype'"):
        pair((plain, one), allow_differences=["dtype"])


def test_a_difference_that_was_let_pass_is_said_first(tmp_path):
    clips, _ = tiny_clips(1)
    ours, theirs = make_run(tmp_path / "ref", clips), make_run(tmp_path / "cand", clips, info=CACHE)
    found = evaluate_runs(ours, theirs, out=tmp_path / "eval", allow_differences=["cache"], resamples=1000)
    said = "The runs differ in cache, which --allow-difference let pass: none for the reference, first-block:0.1 for the candidate."
    assert found["warnings"][0].startswith(said)
    facts = gather(Sources(tmp_path / "eval"))
    assert content(facts)["warnings"][0].startswith(said) and limitations(facts)[0].startswith(said)
    command = next(text for text in reproduction(facts).commands if text.startswith("ptq evaluate"))
    assert command.endswith("--allow-difference cache")
    assert "differ in cache (none, first-block:0.1)" in _measured(facts.evaluation)
    evaluate_runs(ours, make_run(tmp_path / "same", clips), out=tmp_path / "plain", resamples=1000)
    facts = gather(Sources(tmp_path / "plain"))
    assert not any("cache" in text for text in facts.evaluation.warnings) and "cache" not in _measured(facts.evaluation)


def attention(tmp_path, name):
    info = {"settings": {"attention_backend": name}}
    return make_run(tmp_path / str(name), CLIPS, info=info)


def test_attention_in_eight_bits_pairs_with_another_only_where_the_difference_is_named(tmp_path):
    runs = {name: attention(tmp_path, name) for name in (None, "fa3", "_native_cudnn", "fa3-fp8", "sage")}
    for name in ("fa3", "_native_cudnn"):
        assert len(pair((runs[None], runs[name])).pairs) == 4
        assert condition_warnings(*(read_run(runs[key]).info for key in (None, name))) == [
            f"The runs differ in attention_backend: None for the reference, {name} for the candidate."
        ]
    for names in ((None, "fa3-fp8"), ("fa3-fp8", "fa3"), ("sage", None), ("fa3-fp8", "sage")):
        both = [runs[name] for name in names]
        with pytest.raises(PtqError, match=r"attention-backend is .*--allow-difference attention-backend"):
            pair(both, allow_differences=["cache"])
        assert len(pair(both, allow_differences=["attention-backend"]).pairs) == 4
        infos = [read_run(run).info for run in both]
        assert len(allowed_differences(*infos)) == 1 and condition_warnings(*infos) == []
        assert f"{names[0] or 'none'} for the reference, {names[1] or 'none'} for" in allowed_differences(*infos)[0]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("damage", ["no line", "failed", "no video"])
def test_a_missing_unit_is_refused_or_left_out(runs, side, damage):
    if damage == "no video":
        (runs[side] / "videos" / "set_b-1.mp4").unlink()
    else:
        edit_manifest(runs[side], lambda line: line if line["unit"] != "set/b/1" else
                      None if damage == "no line" else {"unit": "set/b/1", "status": "failed", "error": "boom"})  # fmt: skip
    with pytest.raises(PtqError, match=r"set/b/1.*--allow-missing") as raised:
        pair(runs)
    assert ("reference", "candidate")[side] in str(raised.value)
    pairing = pair(runs, allow_missing=True)
    assert len(pairing.pairs) == 3 and list(pairing.excluded) == ["set/b/1"]


def test_units_that_failed_in_both_runs_are_refused_too(runs):
    for run in runs:
        edit_manifest(run, lambda line: line if line["unit"] != "set/b/1" else
                      {"unit": "set/b/1", "status": "failed", "error": "boom"})  # fmt: skip
    with pytest.raises(PtqError, match="boom"):
        pair(runs)


@pytest.mark.parametrize("key", PAIRED_KEYS)
@pytest.mark.parametrize("allow_missing", [False, True])
def test_other_conditions_are_never_paired(runs, key, allow_missing):
    def other(value):
        return value + 2 if isinstance(value, int | float) else "other"

    edit_manifest(runs[1], lambda line: {**line, key: other(line[key])} if line["unit"] == "set/a/1" else line)
    with pytest.raises(PtqError, match="not paired") as raised:
        pair(runs, allow_missing=allow_missing)
    assert key in str(raised.value) and "set/a/1" in str(raised.value)


def test_disjoint_runs_have_nothing_to_compare(tmp_path, runs):
    other = make_run(tmp_path / "other", {"other/a/0": CLIPS["set/a/0"]})
    with pytest.raises(PtqError, match="no unit in common"):
        pair_runs(read_run(runs[0]), read_run(other), allow_missing=True)


def test_an_edited_video_is_noticed(runs):
    unit = read_run(runs[0]).units["set/a/0"]
    verify_video(unit)
    unit.video.write_bytes(unit.video.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedFileError, match=r"set_a-0\.mp4"):
        verify_video(unit)


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(PtqError, match=r"no run\.json"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"digest": "0"}')
    with pytest.raises(PtqError, match="no finished unit"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: {**line, "video": "../elsewhere.mp4"},
        lambda line: {**line, "seed": None},
        lambda line: {"status": "done"},
    ],
)
def test_damaged_manifest_lines_are_refused(runs, change):
    edit_manifest(runs[0], change)
    with pytest.raises(DamagedFileError, match=r"manifest-0of1\.jsonl"):
        read_run(runs[0])


def test_format_and_digest_come_from_run_json(tmp_path):
    run = read_run(make_run(tmp_path / "q", CLIPS, info={"checkpoint": {"format": "mxfp4", "digest": "abc"}}))
    assert (run.info.checkpoint.format, run.info.checkpoint.digest) == ("mxfp4", "abc")
    plain = read_run(make_run(tmp_path / "p", CLIPS))
    assert (plain.info.checkpoint.format, plain.info.checkpoint.digest) == (None, None)


def test_a_run_that_was_stopped_early_is_refused_although_both_have_the_same_units(tmp_path):
    runs = [make_run(tmp_path / name, CLIPS, info={"plan": {"units": 6}}) for name in ("a", "b")]
    with pytest.raises(PtqError, match=r"2 units of the reference.*never started"):
        pair(runs)
    assert len(pair(runs, allow_missing=True).pairs) == 4


def test_another_negative_prompt_is_not_paired(tmp_path):
    runs = [make_run(tmp_path / name, CLIPS, info={"settings": {"negative_prompt": name}}) for name in ("a", "b")]
    with pytest.raises(PtqError, match="not paired: negative_prompt"):
        pair(runs, allow_missing=True)
