"""Every format: what is detected, and what each record becomes. Expected values come from the format table."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.prompts import read_prompts

MM = {"path": "/home/x/OpenS2V-5M/total_part2/part_1/a/a_segment_6.mp4", "cap": "A cat.", "num_frames": 9, "fps": 25.0}
EVAL = {"img_paths": ["Images/cup/52.jpg", "Images/cup/53.jpg"], "prompt": "A cup.", "class_label": ["Cup"]}
NATIVE = {
    "metadata": {
        "path": "part_7/v/v.mp4",
        "face_cut": [12, 95],
        "crop": [10, 1200, 0, 700],
        "cap": ["first", "second"],
        "face_cap_qwen": "qwen",
    },
    "annotation": {"boxes": [1.5, 2.5]},
}


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_opens2v_mm(tmp_path: Path) -> None:
    second = {**MM, "path": "/other/b.mp4", "cap": ["From a list.", "ignored"]}
    result = read_prompts(write(tmp_path / "mm.json", [MM, second]))
    assert (result.format, result.dataset, result.records) == ("opens2v-mm", "mm", 2)
    first, other = result.samples
    assert (first.dataset, first.id, first.prompt, first.score_prompt) == ("mm", "a_segment_6", "A cat.", "A cat.")
    assert (first.media.kind, first.media.path, first.media.frame) == ("video", MM["path"], 0)
    assert (other.id, other.prompt) == ("b", "From a list.")


def test_opens2v_eval_keys_carry_the_domain(tmp_path: Path) -> None:
    open_domain = read_prompts(write(tmp_path / "Open-Domain_Eval.json", {"singleobj_1": EVAL}))
    human = read_prompts(write(tmp_path / "Human-Domain_Eval.json", {"singleobj_1": EVAL}))
    sample = open_domain.samples[0]
    assert (open_domain.format, sample.id) == ("opens2v-eval", "Open-Domain/singleobj_1")
    assert human.samples[0].id == "Human-Domain/singleobj_1"
    assert (sample.media.kind, sample.media.path) == ("image", "Images/cup/52.jpg")
    assert sample.extra == {"references": 2, "reference_policy": "first_reference"}


@pytest.mark.parametrize(
    ("captions", "prompt", "key"),
    [
        ({"face_cap_glm": "glm", "face_cap_Aria": "aria"}, "glm", "face_cap_glm"),
        ({"face_cap_Aria": "aria"}, "aria", "face_cap_Aria"),
        ({"face_cap_glm": "", "face_cap_Aria": None}, "qwen", "face_cap_qwen"),
        ({"face_cap_qwen": None}, "first", "cap"),
    ],
)
def test_native_caption_order(tmp_path: Path, captions: dict, prompt: str, key: str) -> None:
    record = {**NATIVE, "metadata": {**NATIVE["metadata"], **captions}}
    result = read_prompts(write(tmp_path / "total_part3.json", {"v_step1": record}))
    sample = result.samples[0]
    assert (result.format, sample.id, sample.prompt, sample.extra) == (
        "opens2v-5m",
        "v_step1",
        prompt,
        {"caption": key},
    )
    assert (sample.media.kind, sample.media.frame, sample.media.crop) == ("crop", 12, (10, 1200, 0, 700))


def test_vbench_merges_entries_of_one_prompt(tmp_path: Path) -> None:
    entries = [
        {"prompt_en": "a bund", "dimension": ["appearance_style"], "auxiliary_info": {"x": 1}},
        {"prompt_en": "a bird", "dimension": ["color"]},
        {"prompt_en": "a bund", "dimension": ["aesthetic_quality", "appearance_style"]},
    ]
    result = read_prompts(write(tmp_path / "full.json", entries))
    assert (result.format, result.records) == ("vbench", 3)
    assert [(one.id, one.prompt, one.extra["dimension"]) for one in result.samples] == [
        ("a bund", "a bund", ["appearance_style", "aesthetic_quality"]),
        ("a bird", "a bird", ["color"]),
    ]


def test_vbench_i2v(tmp_path: Path) -> None:
    entry = {
        "prompt_en": "a close up, camera pans left",
        "dimension": ["camera_motion"],
        "image_name": "a close up.jpg",
    }
    result = read_prompts(write(tmp_path / "i2v.json", [entry, entry]))
    assert (result.format, result.records, len(result.samples)) == ("vbench-i2v", 2, 1)
    assert result.samples[0].media.path == "a close up.jpg"
    with pytest.raises(DamagedFileError, match="different images"):
        read_prompts(write(tmp_path / "i2v.json", [entry, {**entry, "image_name": "other.jpg"}]))


def test_generic_ids_prompts_and_media(tmp_path: Path) -> None:
    records = [
        {"id": 7, "name": "n", "prompt": "p", "caption": "c", "text": "t", "image": "d/one.png", "video": "two.mp4"},
        {"name": "n", "caption": "c", "text": "t", "video": "two.mp4"},
        {"text": "t", "video": "clips/three.mp4", "id": None, "image": None},
        {"prompt": "only text", "score_prompt": "short"},
    ]
    expected = [
        ("7", "p", "p", "image", "d/one.png"),
        ("n", "c", "c", "video", "two.mp4"),
        ("three", "t", "t", "video", "clips/three.mp4"),
        (hashlib.sha1(b"only text").hexdigest()[:12], "only text", "short", None, None),
    ]
    for name, text in (
        ("list.json", json.dumps(records)),
        ("lines.jsonl", "\n".join(map(json.dumps, records))),
        ("lines.json", "\n".join(map(json.dumps, records)) + "\n"),
        ("pretty.json", json.dumps(records, indent=2)),
    ):
        result = read_prompts(write(tmp_path / name, text))
        assert result.format == "generic"
        found = [
            (one.id, one.prompt, one.score_prompt, one.media and one.media.kind, one.media and one.media.path)
            for one in result.samples
        ]
        assert found == expected, name


def test_txt_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffA caf\u00e9.\r\n\r\n  two words \u2028 same line\nlast".encode())
    result = read_prompts(path)
    assert (result.format, result.records) == ("txt", 3)
    assert [one.prompt for one in result.samples] == ["A caf\u00e9.", "two words \u2028 same line", "last"]
    assert result.samples[0].id == hashlib.sha1("A caf\u00e9.".encode()).hexdigest()[:12]
    assert result.samples[0].media is None


def test_first_match_wins(tmp_path: Path) -> None:
    both = {**MM, "prompt": "generic too"}
    assert read_prompts(write(tmp_path / "a.json", [both])).format == "opens2v-mm"
    vbench = {"prompt_en": "x", "dimension": ["color"], "prompt": "generic too"}
    assert read_prompts(write(tmp_path / "b.json", [vbench])).format == "vbench"


def test_prompt_format_overrides_detection(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{**MM, "prompt": "from prompt"}])
    result = read_prompts(path, prompt_format="generic")
    assert (result.format, result.samples[0].prompt) == ("generic", "from prompt")
    i2v = write(tmp_path / "v.json", [{"prompt_en": "x", "dimension": ["color"], "image_name": "x.jpg"}])
    assert read_prompts(i2v, prompt_format="vbench").samples[0].media is None
    plain = write(tmp_path / "prompts.list", "first\nsecond\n")
    assert [one.prompt for one in read_prompts(plain, prompt_format="txt").samples] == ["first", "second"]


def test_prompt_format_that_cannot_hold_the_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [MM])
    with pytest.raises(UsageError, match=r"is a JSON list.*opens2v-eval is a JSON object"):
        read_prompts(path, prompt_format="opens2v-eval")
    with pytest.raises(UsageError, match=r"no prompt format 'csv'.*opens2v-mm"):
        read_prompts(path, prompt_format="csv")
    with pytest.raises(DamagedFileError, match=r"record \[0\], key 'prompt_en'.*found nothing"):
        read_prompts(path, prompt_format="vbench")


@pytest.mark.parametrize(
    "value",
    [
        {"gm1": ["dataset1/gm1_step1", "dataset1/gm1_step2"]},
        {"gm1": [{"cur_id": "a", "aft_id": "b"}]},
        [{"cur_id": "a", "aft_id": "b", "prompt": "not a prompt file"}],
        [[{"cur_id": "a"}]],
    ],
)
def test_cluster_and_pair_files_are_refused(tmp_path: Path, value: object) -> None:
    path = write(tmp_path / "pairs.json", value)
    with pytest.raises(PtqError, match="cluster or cross-pair"):
        read_prompts(path)
    with pytest.raises(PtqError, match="cluster or cross-pair"):
        read_prompts(path, prompt_format="generic")


@pytest.mark.parametrize("value", [[1], [{"title": "x"}], {"a": {"prompt": "x"}}, {"a": 1}])
def test_unknown_shapes_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(PtqError, match="no known prompt format"):
        read_prompts(write(tmp_path / "what.json", value))


def test_limit_counts_samples_after_exclude(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "a\nb\nc\nd\ne\n")
    banned = write(tmp_path / "banned.jsonl", '{"id": "other", "prompt": "  B "}\n')
    result = read_prompts(path, exclude=banned, limit=2)
    assert [one.prompt for one in result.samples] == ["a", "c"]
    assert result.excluded == 1
    # Dropping some prompts never changes the identity of the others.
    everything = {one.prompt: one for one in read_prompts(path).samples}
    assert all(everything[one.prompt] == one for one in result.samples)
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match="limit is 0"):
        read_prompts(path, limit=0)
    with pytest.raises(PtqError, match="nothing is left"):
        read_prompts(path, exclude=path)
