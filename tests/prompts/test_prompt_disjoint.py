"""Leaving out the prompts that another file has too, by id and by caption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq.errors import PtqError
from ptq.prompts import PromptSet, read_prompts


def make(path: Path, **prompts: str) -> PromptSet:
    path.write_text(json.dumps([{"id": key, "prompt": value} for key, value in prompts.items()]))
    return read_prompts(path)


def test_excluding_by_id_and_by_caption(tmp_path: Path) -> None:
    a = make(tmp_path / "a.json", one="A red cat.", two="A dog", three="Only here", four="same text")
    b = make(tmp_path / "b.json", x="a  RED\ncat.", two="another dog", four="same text")
    left = read_prompts(a.path, exclude=b.path)
    assert ([one.id for one in left.samples], left.excluded, left.records) == (["three"], 3, 4)
    assert left.samples[0] == a.samples[2]


def test_score_prompts_count_as_captions(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"id": "long", "prompt": "an expanded, long prompt", "score_prompt": "a cat"}]))
    short = make(tmp_path / "short.json", s="A cat", other="A dog")
    assert [one.id for one in read_prompts(short.path, exclude=path).samples] == ["other"]
    with pytest.raises(PtqError, match="nothing is left"):
        read_prompts(path, exclude=short.path)


def test_a_broken_exclude_file_is_an_error(tmp_path: Path) -> None:
    a = make(tmp_path / "a.json", one="A red cat.")
    (tmp_path / "b.json").write_text('[{"prompt": 5}]')
    with pytest.raises(PtqError, match=r"b\.json, record \[0\]"):
        read_prompts(a.path, exclude=tmp_path / "b.json")
