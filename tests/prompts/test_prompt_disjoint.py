"""Disjointness by id and by caption, and leaving prompts out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq.errors import PtqError
from ptq.prompts import Overlap, PromptSet, check_disjoint, find_overlaps, read_prompts


def make(path: Path, **prompts: str) -> PromptSet:
    path.write_text(json.dumps([{"id": key, "prompt": value} for key, value in prompts.items()]))
    return read_prompts(path)


def test_overlaps_by_id_and_by_caption(tmp_path: Path) -> None:
    a = make(tmp_path / "a.json", one="A red cat.", two="A dog", three="Only here", four="same text")
    b = make(tmp_path / "b.json", x="a  RED\ncat.", two="another dog", four="same text")
    assert find_overlaps(a.samples, b.samples) == [
        Overlap("one", "caption"),
        Overlap("two", "id"),
        Overlap("four", "id"),
    ]
    with pytest.raises(PtqError) as caught:
        check_disjoint(a, b)
    for part in ("a.json", "b.json", "share 3 prompts", "'one' (same caption)", "'two' (same id)", "--exclude"):
        assert part in str(caught.value)


def test_score_prompts_count_as_captions(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"id": "long", "prompt": "an expanded, long prompt", "score_prompt": "a cat"}]))
    short = make(tmp_path / "short.json", s="A cat")
    expanded = read_prompts(path)
    assert find_overlaps(short.samples, expanded.samples) == [Overlap("s", "caption")]
    assert find_overlaps(expanded.samples, short.samples) == [Overlap("long", "caption")]


def test_excluding_makes_sets_disjoint(tmp_path: Path) -> None:
    a = make(tmp_path / "a.json", one="A red cat.", two="A dog", three="Only here")
    b = make(tmp_path / "b.json", x="a red cat.", two="another dog")
    left = read_prompts(a.path, exclude=b.path)
    assert ([one.id for one in left.samples], left.excluded, left.records) == (["three"], 2, 3)
    check_disjoint(left, b)
    assert left.samples[0] == a.samples[2]


def test_a_broken_exclude_file_is_an_error(tmp_path: Path) -> None:
    a = make(tmp_path / "a.json", one="A red cat.")
    (tmp_path / "b.json").write_text('[{"prompt": 5}]')
    with pytest.raises(PtqError, match=r"b\.json, record \[0\]"):
        read_prompts(a.path, exclude=tmp_path / "b.json")
