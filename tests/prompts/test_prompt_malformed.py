"""Malformed prompt files: the message names the file, the record and the key, and nothing is skipped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ptq.errors import DamagedFileError, PtqError
from ptq.prompts import read_prompts

GOOD = {"prompt": "fine", "id": "good"}
NATIVE = {"path": "a.mp4", "face_cut": [0, 9], "crop": [0, 8, 0, 8], "cap": ["x"]}


def refuse(path: Path, content: bytes | object, *parts: str) -> None:
    """Reading `content` fails with a message that has `path` and every one of `parts`."""
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(PtqError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message


@pytest.mark.parametrize("value", [None, "", "  ", 5, ["x"], {"a": 1}])
def test_prompt_that_is_no_text(tmp_path: Path, value: object) -> None:
    refuse(tmp_path / "a.json", [GOOD, {"id": "bad", "prompt": value}], "record [1]", "'prompt'", json.dumps(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [("cap", None), ("cap", []), ("cap", [5]), ("path", 5), ("path", "/"), ("cap", {"a": "b"})],
)
def test_opens2v_mm_values(tmp_path: Path, key: str, value: object) -> None:
    good = {"path": "/x/a.mp4", "cap": "fine"}
    refuse(tmp_path / "a.json", [good, {**good, "path": "b.mp4", key: value}], "record [1]", repr(key))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop", [0, 8, 0]),
        ("crop", [8, 0, 0, 8]),
        ("crop", [0, 8, 5, 5]),
        ("crop", [0, 8, 0, -1]),
        ("crop", [0, 8, 0, 1.5]),
        ("crop", None),
        ("face_cut", []),
        ("face_cut", ["0", "9"]),
        ("path", None),
        ("cap", None),
        ("face_cap_glm", 5),
    ],
)
def test_native_values(tmp_path: Path, key: str, value: object) -> None:
    bad = {"metadata": {**NATIVE, key: value}}
    refuse(tmp_path / "a.json", {"first": {"metadata": NATIVE}, "k2": bad}, 'record "k2"', f"'metadata.{key}'")


@pytest.mark.parametrize("value", [None, [], "x.jpg", [None], [""]])
def test_eval_image_paths(tmp_path: Path, value: object) -> None:
    good = {"img_paths": ["a.jpg"], "prompt": "fine"}
    refuse(tmp_path / "a.json", {"k1": good, "k2": {**good, "img_paths": value}}, 'record "k2"', "'img_paths'")


def test_records_that_are_no_objects(tmp_path: Path) -> None:
    refuse(tmp_path / "a.json", [GOOD, 5], "record [1]", "found int")
    refuse(tmp_path / "a.jsonl", b'{"prompt": "x"}\n["y"]\n', "record line 2", "found list")


def test_repeated_ids_name_both_records(tmp_path: Path) -> None:
    refuse(tmp_path / "a.json", [GOOD, {"prompt": "other"}, {**GOOD, "prompt": "more"}], "[0] and [2]", "'good'")
    refuse(tmp_path / "a.txt", b"one\ntwo\n\none\n", "line 1 and line 4", "same prompt")
    same_stem = [{"path": "/p1/a.mp4", "cap": "x"}, {"path": "/p2/a.mp4", "cap": "y"}]
    refuse(tmp_path / "b.json", same_stem, "[0] and [1]", "'a'")
    native = b'{"k": {"metadata": %s}, "k": {"metadata": %s}}' % ((json.dumps(NATIVE).encode(),) * 2)
    refuse(tmp_path / "c.json", native, '"k" and "k"')


def test_ids_with_equal_hashes_are_not_repeated_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq.prompts.reader.hash", lambda text: 1, raising=False)
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\nthree\n")
    assert len(read_prompts(path).samples) == 3


def test_truncated_json_names_the_last_good_record_and_the_place(tmp_path: Path) -> None:
    whole = json.dumps([{"prompt": f"prompt {index}"} for index in range(100)], indent=1).encode()
    cut = whole[: whole.index(b"prompt 40") + 5]
    refuse(tmp_path / "a.json", cut, "not valid JSON", "after record [39]", "line 123 column")
    refuse(tmp_path / "a.json", b'[{"prompt": "x"}', "not valid JSON")
    refuse(tmp_path / "a.json", b'[{"prompt": "x"}] tail', "not valid JSON")


def test_text_that_is_not_json_or_utf8(tmp_path: Path) -> None:
    refuse(tmp_path / "a.json", b'[{"prompt": NaN}]', "not valid JSON", "NaN")
    refuse(tmp_path / "a.json", b'[{"prompt": "caf\xe9"}]', "not valid JSON")
    refuse(tmp_path / "a.txt", b"fine\ncaf\xe9\n", "line 2", "UTF-8")
    refuse(tmp_path / "a.jsonl", b'{"prompt": "x"}\n{"prompt": "y"', "line 2", "not valid JSON")
    refuse(tmp_path / "a.jsonl", b'{"prompt": "\\ud800"}', "line 1", "surrogate")
    refuse(tmp_path / "a.dat", b"\x00\x01\x02", "neither")


def test_empty_and_absent_files(tmp_path: Path) -> None:
    for content in (b"", b" \n\t\n", b"\xef\xbb\xbf"):
        refuse(tmp_path / "a.txt", content, "is empty")
    refuse(tmp_path / "a.json", b"[]", "no records")
    refuse(tmp_path / "a.json", b"{}", "no records")
    with pytest.raises(PtqError, match="does not exist"):
        read_prompts(tmp_path / "absent.json")
    with pytest.raises(PtqError, match="is a directory"):
        read_prompts(tmp_path)


def test_a_record_behind_the_limit_is_not_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, {"prompt": None}]))
    assert len(read_prompts(path, limit=1).samples) == 1
    with pytest.raises(DamagedFileError, match=re.escape("[1]")):
        read_prompts(path, limit=2)
