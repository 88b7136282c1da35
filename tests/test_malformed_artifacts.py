"""One list of mutations against every file that a command reads: refused with one paragraph, soon, and nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from malformed import KEYS, NAMES, check_refused, mutate

from ptq.checkpoint.safetensors_file import read_header
from ptq.config import load_recipe
from ptq.quantization.workdir import FinishedBlock
from ptq.store.files import read_json
from ptq.store.schema import parse
from ptq.store.sensitivity import read_protection, read_sensitivity
from ptq.store.submission import read_submission

SHA = "0" * 64
STEP = {"index": 0, "timestep": 999.0, "sigma": 0.5, "d_sigma": 0.25, "expert": "transformer"}
CALIBRATION = {
    "variant": "T2V-A14B", "experts": {"transformer": SHA}, "preset": {"height": 32}, "prompts": {"name": "p", "sha256": SHA},
    "samples": [], "records_per_prompt": 2, "seed": 0, "schedule": [STEP], "complete": True, "files": {}, "digest": SHA,
}  # fmt: skip
RECORD = {
    "record": "0-0-cond", "file": "records/00000.safetensors", "sample_id": "a", "expert": "transformer", "step": 0,
    "timestep": 999.0, "sigma": 0.5, "d_sigma": 0.25, "branch": "cond",
}  # fmt: skip
RUN = {
    "schema": 1,
    "model": "m",
    "digest": SHA,
    "settings": {},
    "plan": {"units": 1, "samples_per_prompt": 1, "shards": 1},
}
LINE = {
    "unit": "d/a/0", "dataset": "d", "sample_id": "a", "k": 0, "prompt": "p", "score_prompt": "p", "seed": 1, "latent_sha256": SHA,
    "width": 32, "height": 32, "frames": 5, "fps": 8, "video": "videos/a-0.mp4", "video_sha256": SHA, "status": "done",
}  # fmt: skip
ESTIMATE = {"value": 0.001, "low": -0.002, "high": 0.003}
DIMENSION = {"reference": 0.9, "candidate": 0.8, "relative_loss": ESTIMATE, "points": ESTIMATE, "units": 1}
EVALUATION = {
    "schema": 1, "ptq_version": "1", "suite": "tiny", "format": "hif4", "limit": 0.005, "gate": "mean_signed",
    "bootstrap": {"resamples": 1000, "seed": 0, "confidence": 0.95, "method": "m"}, "reference": {}, "candidate": {}, "units": 1,
    "dimensions": {"colour": DIMENSION}, "aggregates": {"mean_signed": ESTIMATE}, "verdict": "PASS", "prompts": 1,
}  # fmt: skip
UNIT = {"unit": "d/a/0", "reference": {"colour": 1.0}, "candidate": {"colour": 0.5}, "paired": {}}
VBENCH = {"aesthetic_quality": [0.5, [{"video_path": "a-0.mp4", "video_results": 0.5}]]}
SENSITIVITY = {
    "metric": "error", "quantize_one": [{"expert": "transformer", "block": 0, "error": 0.1}], "picks": [], "comparison": {"none": 0.1},
}  # fmt: skip
MANIFEST = {
    "manifest_version": 1, "package_version": "1", "versions": {}, "format": "hif4", "variant": "T2V-A14B", "base_model": {},
    "recipe_name": "rtn", "recipe": load_recipe("rtn", "hif4").model_dump(mode="json"), "calibration": None, "high_precision": [],
    "budget_scope": "total", "experts": [], "layers": [], "signature": SHA, "seconds": 1.0, "peak_memory_bytes": 1, "files": {},
    "coverage": {
        "linear_parameters": 1, "quantized_parameters": 1, "parameter_share": 1.0, "flop_share": 1.0,
        "bits_per_quantized_value": 4.5, "quantized_bytes": 1, "basis_bytes": 0, "original_bytes": 2,
    },
    "blocks": [{"expert": "transformer", "block": 0, "stream_error": 0.1, "high_precision": False, "seconds": 1.0}],
}  # fmt: skip
NATIVE = {"path": "a.mp4", "cap": ["x"], "face_cut": [0, 9], "crop": [0, 8, 0, 8]}
PICKS = [{"expert": "transformer", "block": 0, "before": 0.2, "after": 0.1}]
SUBMISSION = {
    "budget_scope": "total", "checkpoint_digest": "d", "failing_gate_allowed": False, "format": "hif4",
    "high_precision": [], "limit": 0.005, "schema": 1, "variant": "T2V-A14B", "verdict": "PASS",
}  # fmt: skip
HEADER = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}


@dataclass(frozen=True)
class Artifact:
    """file: relative to the folder. content: its JSON. number: path to a number in it. arguments: the command on the folder.

    wrap: from the bytes of the JSON to those of the file. passes: mutations that are no fault here.
    """

    file: str
    content: Any
    number: tuple[str | int, ...]
    arguments: Callable[[Path], tuple[object, ...]]
    wrap: Callable[[bytes], bytes] = lambda data: data
    passes: frozenset[str] = frozenset()


def prompts(name: str, content: Any, number: tuple[str | int, ...], *passes: str, **others: Any) -> Artifact:
    return Artifact(name, content, number, lambda f: ("prompts", f / name), passes=frozenset(passes), **others)


def calibrated(folder: Path) -> tuple[object, ...]:
    return "quantize", "tiny", "--calibration", folder, "--format", "hif4", "--out", folder / "out", "--dry-run"


def evaluated(folder: Path) -> tuple[object, ...]:
    return "evaluate", "--reference", folder, "--candidate", folder, "--out", folder / "out"


def imported(folder: Path) -> tuple[object, ...]:
    files = (folder / "a.json", folder / "a.json")
    chosen = ("--format", "hif4", "--dimensions", "aesthetic_quality")
    return "evaluate", "--import-vbench", *files, *chosen, "--out", folder / "out"


def reported(folder: Path) -> tuple[object, ...]:
    return "report", folder, "--html", folder / "out.html", "--checkpoint", folder


def inspected(folder: Path) -> tuple[object, ...]:
    return "inspect", folder


def by(read: Callable[[Path], Any]) -> Callable[[Path], tuple[object, ...]]:
    """The artifact's own reader, where a command reaches it only with a whole model."""
    return lambda folder: (lambda: read(folder),)


def read_block(folder: Path) -> None:
    """A finished block that is damaged is made again: here the reader itself."""
    path = folder / "00000.json"
    parse(FinishedBlock, read_json(path), path, "")


def safetensors(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(4)


def line(data: bytes) -> bytes:
    """A JSON line and a whole one behind it, so that it is no torn last line."""
    return data.replace(b"\n", b" ") + b"\n" + b'{"whole": 1}\n'


IN_LINES = frozenset({"empty", "space"})
"""Lines that are not there are no fault."""
FREE = frozenset({"extra", "value negative"})
"""In formats of others, keys of no meaning are passed over, and these numbers may be negative."""
ARTIFACTS = {
    "prompts-eval": prompts("a.json", {"k": {"img_paths": ["a.png"], "prompt": 3}}, ("k", "prompt"), "value text", "value controls", *FREE),
    "prompts-native": prompts("a.json", {"k": {"metadata": NATIVE}}, ("k", "metadata", "face_cut", 0), "value true"),
    "prompts-mm": prompts("a.json", [{"path": "a.mp4", "cap": 3}], (0, "cap"), "value text", "value controls", "extra"),
    "prompts-vbench": prompts("a.json", [{"prompt_en": "x", "dimension": 3}], (0, "dimension"), "extra"),
    "prompts-generic": prompts("a.json", [{"prompt": 3}], (0, "prompt"), "value text", "value controls", "extra"),
    "prompts-wrapped": prompts("a.json", {"prompts": [{"prompt": 3}]}, ("prompts", 0, "prompt"), "value text", "value controls", "extra"),
    "prompts-lines": prompts("a.jsonl", {"prompt": 3}, ("prompt",), "string", "value text", "value controls", "extra"),
    "calibration": Artifact("calibration.json", CALIBRATION, ("records_per_prompt",), calibrated),
    "schedule": Artifact("calibration.json", CALIBRATION, ("schedule", 0, "sigma"), calibrated),
    "recording": Artifact("calibration.json", CALIBRATION, ("seed",), lambda f: ("status", f)),
    "run": Artifact("run.json", RUN, ("plan", "units"), evaluated, passes=frozenset({"missing"})),
    "run-status": Artifact("run.json", RUN, ("plan", "shards"), lambda f: ("status", f), passes=frozenset({"missing"})),
    "manifest-line": Artifact("manifest-0of1.jsonl", LINE, ("width",), evaluated, line, IN_LINES),
    "evaluation": Artifact("evaluation.json", EVALUATION, ("units",), reported),
    "dimension": Artifact("evaluation.json", EVALUATION, ("dimensions", "colour", "units"), reported),
    "unit-line": Artifact("units.jsonl", UNIT, ("reference", "colour"), reported, line, IN_LINES | {"value null", "value negative", "missing", "extra"}),
    "vbench": Artifact("a.json", VBENCH, ("aesthetic_quality", 1, 0, "video_results"), imported, passes=frozenset({"value true", *FREE})),
    "checkpoint": Artifact("ptq_manifest.json", MANIFEST, ("coverage", "quantized_bytes"), inspected),
    "checkpoint-block": Artifact("ptq_manifest.json", MANIFEST, ("blocks", 0, "block"), inspected),
    "checkpoint-recipe": Artifact("ptq_manifest.json", MANIFEST, ("recipe", "records", "for_report"), inspected, passes=frozenset({"missing"})),
    "sensitivity": Artifact("ptq_sensitivity.json", SENSITIVITY, ("quantize_one", 0, "error"), by(read_sensitivity)),
    "protection": Artifact("protection.json", PICKS, (0, "block"), by(read_protection)),
    "submission": Artifact("submission.json", SUBMISSION, ("limit",), by(read_submission), passes=frozenset({"value null"})),
    "block": Artifact("00000.json", {"block": MANIFEST["blocks"][0], "layers": []}, ("block", "stream_error"), by(read_block)),
    "safetensors": Artifact("a.safetensors", HEADER, ("a", "data_offsets", 0), by(lambda f: read_header(f / "a.safetensors")), safetensors),
    "safetensors-shape": Artifact("a.safetensors", HEADER, ("a", "shape", 0), by(lambda f: read_header(f / "a.safetensors")), safetensors),
}  # fmt: skip
BESIDE = {
    "calibration.json": CALIBRATION, "run.json": RUN, "manifest-0of1.jsonl": LINE, "evaluation.json": EVALUATION, "units.jsonl": UNIT,
    "ptq_manifest.json": MANIFEST,
}  # fmt: skip
"""Good files that a command needs beside the one that is mutated."""
NEEDS = {
    "calibration.json": (), "run.json": ("manifest-0of1.jsonl",), "manifest-0of1.jsonl": ("run.json",), "a.json": (),
    "a.jsonl": (), "evaluation.json": (), "units.jsonl": ("evaluation.json",), "ptq_manifest.json": (),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What is imported on first use is no cost of a file."""
    from ptq.cli.common import quiet_libraries

    quiet_libraries()


CASES = [
    (name, mutation)
    for name, artifact in ARTIFACTS.items()
    for mutation in NAMES
    if mutation not in artifact.passes and (mutation not in KEYS or isinstance(artifact.number[-1], str))
]


@pytest.mark.parametrize(("name", "mutation"), CASES)
def test_what_is_malformed_is_refused(tmp_path: Path, name: str, mutation: str) -> None:
    artifact = ARTIFACTS[name]
    for other in NEEDS.get(artifact.file, ()):
        (tmp_path / other).write_text(json.dumps(BESIDE[other]) + "\n")
    (tmp_path / artifact.file).write_bytes(artifact.wrap(mutate(artifact.content, artifact.number, mutation)))
    assert artifact.file.split("/")[-1] in check_refused(tmp_path, *artifact.arguments(tmp_path))


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
