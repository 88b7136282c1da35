"""One list of mutations against every file of others: prompts, recipes, scores of VBench. Refused soon, nothing is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from malformed import FREE, Artifact, cases, check_refused

VBENCH = {"aesthetic_quality": [0.5, [{"video_path": "a-0.mp4", "video_results": 0.5}]]}
NATIVE = {"path": "a.mp4", "cap": ["x"], "face_cut": [0, 9], "crop": [0, 8, 0, 8]}


def prompts(name: str, content: Any, number: tuple[str | int, ...], *passes: str, **others: Any) -> Artifact:
    return Artifact(name, content, number, lambda f: ("prompts", f / name), passes=frozenset(passes), **others)


def imported(folder: Path) -> tuple[object, ...]:
    files = (folder / "a.json", folder / "a.json")
    chosen = ("--format", "hif4", "--dimensions", "aesthetic_quality")
    return "evaluate", "--import-vbench", *files, *chosen, "--out", folder / "out"


ARTIFACTS = {
    "prompts-eval": prompts("a.json", {"k": {"img_paths": ["a.png"], "prompt": 3}}, ("k", "prompt"), "value text", "value controls", *FREE, every=True),
    "prompts-native": prompts("a.json", {"k": {"metadata": NATIVE}}, ("k", "metadata", "face_cut", 0), "value true"),
    "prompts-mm": prompts("a.json", [{"path": "a.mp4", "cap": 3}], (0, "cap"), "value text", "value controls", "extra"),
    "prompts-vbench": prompts("a.json", [{"prompt_en": "x", "dimension": 3}], (0, "dimension"), "extra"),
    "prompts-generic": prompts("a.json", [{"prompt": 3}], (0, "prompt"), "value text", "value controls", "extra"),
    "prompts-wrapped": prompts("a.json", {"prompts": [{"prompt": 3}]}, ("prompts", 0, "prompt"), "value text", "value controls", "extra"),
    "prompts-lines": prompts("a.jsonl", {"prompt": 3}, ("prompt",), "string", "value text", "value controls", "extra", every=True),
    "vbench": Artifact("a.json", VBENCH, ("aesthetic_quality", 1, 0, "video_results"), imported, passes=frozenset({"value true", *FREE})),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mutation"), cases(ARTIFACTS))
def test_what_is_malformed_is_refused(tmp_path: Path, name: str, mutation: str) -> None:
    ARTIFACTS[name].refused(tmp_path, mutation)


RECIPES = {
    "bomb": "a: &a [x,x]\n" + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "own-alias": "a: &a [*a]",
    "learned_transform": "learned_transform: true\nrotation: 0",
    "empty": "",
    "scalar": "3",
    "list": "[1]",
    "deep": "[" * 5000,
    "deep-objects": "{a: " * 5000,
    "deep-dashes": "- " * 5000,
    "twice": "solver: {damping: 0.1, damping: 0.2}",
    "nan": "solver: {damping: .nan}",
    "infinity": "solver: {damping: .inf}",
    "huge": f"scheme: {{block: {'9' * 9000}}}",
    "negative": "records: {for_report: -1}",
    "null": "solver: null",
    "wrong-type": "solver: {act_order: 3}",
    "extra": "solver: {roundin: rtn}",
    "key": "{1: 2}",
    "list-key": "? [a]\n: 3",
    "python": "description: !!python/object/apply:os.system [true]",
    "date": "description: 2024-99-99",
    "long": "description: " + "x" * 70_000,
    "half": 'description: "\\ud800"',
    "controls": "description: \x00",
    "unclosed": "solver: {damping: [",
    "tab": "solver:\n\tdamping: 1",
    "many": f"solver: {{smoothing: [{'0.5,' * 2000}]}}",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_malformed_recipe_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPES[name], encoding="utf-8")
    arguments = ("--format", "hif4", "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "out")
    message = check_refused(tmp_path, "quantize", "tiny", "--calibration", tmp_path, *arguments)
    assert "r.yaml" in message and "calibration directory" not in message


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", bytes(range(256))])
def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(data)
    arguments = ("--format", "hif4", "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert "r.yaml" in check_refused(tmp_path, "quantize", "tiny", "--calibration", tmp_path, *arguments)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rotation=32", "--set rotation has keys of an earlier version"),
        ("solver.roundin=", "--set solver.roundin: there is no such key (did you mean rounding?)"),
        ("solver.damping=.nan", "--set solver.damping: should be a finite number"),
        ("solver.damping=" + "9" * 5000, "--set solver.damping: the value"),
        ("solver.rounding=[*a]", "aliases (*name) are not read"),
        ("scheme.block=-1", "--set scheme.block: should be greater"),
    ],
)
def test_a_wrong_override_is_blamed_by_its_name(tmp_path: Path, override: str, words: str) -> None:
    arguments = ("--format", "hif4", "--set", override, "--out", tmp_path / "out")
    message = check_refused(tmp_path, "quantize", "tiny", "--calibration", tmp_path, *arguments)
    assert words in message and "Recipe hif4" not in message


ROWS = {
    "cells": (b"prompt,id\na,b,c\n", "3 cells"),
    "column": (b"title,id\na,b\n", "'title'"),
    "header": (b"prompt\n", "no records"),
    "quote": (b'prompt\n"' + b"a\n" * 200_000, "not valid CSV"),
    "utf-16": ("prompt\na\n".encode("utf-16"), "not UTF-8"),
    "line": (b"prompt\n" + b"a" * (9 << 20), "longer than 8 MiB"),
    "long": (b"prompt\n" + b"a" * 120_000, "at most 100000"),
}


@pytest.mark.parametrize("name", ROWS)
def test_malformed_csv_is_refused(tmp_path: Path, name: str) -> None:
    data, words = ROWS[name]
    (tmp_path / "p.csv").write_bytes(data)
    assert words in check_refused(tmp_path, "prompts", tmp_path / "p.csv")


@pytest.mark.parametrize("data", [b"[" * (40 << 20), b"fine\ncaf\xe9\n", b"", b"x" * (9 << 20)])
def test_malformed_text_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    check_refused(tmp_path, "prompts", tmp_path / "p.txt")


def test_a_large_file_of_brackets_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"[" * (40 << 20))
    assert "nested more than 64 deep" in check_refused(tmp_path, "prompts", tmp_path / "p.json")
    (tmp_path / "p.json").write_bytes(b'[["' + b"a" * (40 << 20))
    assert "longer than 8 MiB" in check_refused(tmp_path, "prompts", tmp_path / "p.json")


def test_a_pipe_is_no_prompt_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.json")
    assert "pipe or a device" in check_refused(tmp_path, "prompts", tmp_path / "p.json")
    assert "pipe or a device" in check_refused(tmp_path, "prompts", "/dev/null")
