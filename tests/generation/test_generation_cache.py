"""`--cache first-block`: against a first-block cache written out here, on both experts, forgotten between videos."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_helpers import MODEL, SETTINGS, file_digests, lines, make_samples
from torch import nn
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import PtqError, UsageError
from ptq.generation import Settings, resolve_settings, run_generation
from ptq.report.reproduce import _GENERATE_OPTIONS
from ptq.wan.caching import normal_cache
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline

CACHED = replace(SETTINGS, steps=12, cache="first-block:0.5")


class FirstBlockCache(nn.Module):
    """All blocks of an expert as one. Calls alternate between the two branches, each with a memory of its own."""

    def __init__(self, blocks: nn.ModuleList, threshold: float) -> None:
        super().__init__()
        self.blocks, self.threshold, self.calls = blocks, threshold, 0
        self.memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.skipped = 0

    def forward(self, hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        branch, self.calls = self.calls % 2, self.calls + 1
        first = self.blocks[0](hidden, *others)
        change = first - hidden
        if branch in self.memory:
            before, rest = self.memory[branch]
            if (change - before).abs().mean() / before.abs().mean() <= self.threshold:
                self.skipped += 1
                return first + rest
        output = first
        for block in self.blocks[1:]:
            output = block(output, *others)
        self.memory[branch] = (change, output - first)
        return output


def make(pipe: Any, out: Path, settings: Settings, count: int = 1):
    return run_generation(lambda: pipe, make_samples(count), settings, out, model=MODEL)


def load(pipe_dir: Path) -> Any:
    return load_pipeline(pipe_dir, dtype=torch.float32)


def latents(out: Path) -> dict[str, str]:
    return {name: value for name, value in file_digests(out).items() if name.startswith("latents")}


def test_latents_are_those_of_a_cache_written_out(pipe_dir: Path, tmp_path: Path):
    make(load(pipe_dir), tmp_path / "cached", CACHED, 2)
    plain = replace(CACHED, cache=None)
    pipe = load(pipe_dir)
    caches = {}
    for name in ("transformer", "transformer_2"):
        expert = getattr(pipe, name)
        caches[name] = FirstBlockCache(expert.blocks, 0.5)
        expert.blocks = nn.ModuleList([caches[name]])

    class Forgetting:
        """The caches are emptied at the first step of each video."""

        def __init__(self, encode: Any) -> None:
            self.encode = encode

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            for cache in caches.values():
                cache.memory.clear()
            return self.encode(*args, **kwargs)

    pipe.encode_prompt = Forgetting(pipe.encode_prompt)
    make(pipe, tmp_path / "reference", plain, 2)
    assert all(0 < cache.skipped < cache.calls for cache in caches.values()), [vars(c) for c in caches.values()]
    assert latents(tmp_path / "cached") == latents(tmp_path / "reference")
    make(load(pipe_dir), tmp_path / "plain", plain, 2)
    assert not set(latents(tmp_path / "cached").items()) & set(latents(tmp_path / "plain").items())


def test_a_failed_video_leaves_nothing_to_the_next(pipe_dir: Path, tmp_path: Path):
    make(load(pipe_dir), tmp_path / "good", CACHED, 2)
    pipe, calls = load(pipe_dir), []

    def fail_once(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a passing trouble")

    pipe.transformer.proj_out.register_forward_pre_hook(fail_once)
    summary = make(pipe, tmp_path / "shaken", CACHED, 2)
    assert summary.done == 2 and [line["status"] for line in lines(tmp_path / "shaken")] == ["failed", "done", "done"]
    assert latents(tmp_path / "shaken") == latents(tmp_path / "good")


def test_the_same_pipeline_afterwards_without(pipe_dir: Path, tmp_path: Path):
    pipe, plain = load(pipe_dir), replace(CACHED, cache=None)
    make(pipe, tmp_path / "cached", CACHED)
    make(pipe, tmp_path / "after", plain)
    make(load(pipe_dir), tmp_path / "plain", plain)
    assert latents(tmp_path / "after") == latents(tmp_path / "plain") != latents(tmp_path / "cached")


def test_a_cache_is_part_of_the_run(pipe_dir: Path, tmp_path: Path):
    def never() -> None:
        raise AssertionError("the pipeline was loaded")

    out = tmp_path / "run"
    make(load(pipe_dir), out, CACHED)
    assert json.loads((out / "run.json").read_text())["settings"]["cache"] == "first-block:0.5"
    for other in (None, "first-block:0.1"):
        with pytest.raises(PtqError, match=r"cache was 'first-block:0\.5', now"):
            run_generation(never, make_samples(1), replace(CACHED, cache=other), out, model=MODEL)
    assert "cache" in _GENERATE_OPTIONS


def test_from_the_command_line(pipe_dir: Path, tmp_path: Path):
    size = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "12", "--device", "cpu", "--json"]
    command = ["generate", str(pipe_dir), "--prompt", "a red ball", "--out", str(tmp_path / "run"), *size]
    plan = json.loads(CliRunner().invoke(app, [*command, "--cache", "first-block", "--dry-run"]).stdout)
    assert plan["settings"]["cache"] == "first-block:0.05"
    memory = plan["memory"]
    assert memory["vram"] == 0 and memory["ram"] == max(memory["encoding"], memory["denoising"]) > 0
    result = CliRunner().invoke(app, [*command, "--cache", "first-block:0.5"])
    assert result.exit_code == 0 and json.loads(result.stdout)["done"] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["cache"] == "first-block:0.5"
    again = CliRunner().invoke(app, [*command, "--cache", "first-block"])
    assert again.exit_code == 1 and "cache was 'first-block:0.5', now 'first-block:0.05'" in str(again.exception)


def test_a_run_of_before_there_were_caches_goes_on(pipe_dir: Path, tmp_path: Path):
    out = tmp_path / "run"
    make(load(pipe_dir), out, SETTINGS)
    assert not {"cache", "compile"} & json.loads((out / "run.json").read_text())["settings"].keys()
    assert make(None, out, SETTINGS).kept == 1
    with pytest.raises(PtqError, match=r"cache was .*first-block"):
        make(None, out, CACHED)


def test_a_layer_that_gives_nan_under_a_cache_is_a_failed_unit(pipe_dir: Path, tmp_path: Path):
    pipe = load(pipe_dir)
    with torch.no_grad():
        pipe.transformer.blocks[1].ffn.net[2].bias[3] = float("nan")
    (text,) = make(pipe, tmp_path / "run", CACHED).failed.values()
    assert "Step 1 of 12" in text and "run without --cache to have the layer named" in text


@pytest.mark.parametrize(
    ("typed", "found"),
    [(None, None), ("first-block", "first-block:0.05"), ("first-block:0.10", "first-block:0.1"), ("first-block:1", "first-block:1")],
)  # fmt: skip
def test_what_is_typed_has_one_spelling(typed: str | None, found: str | None):
    assert normal_cache(typed) == found == normal_cache(found)


@pytest.mark.parametrize("typed", ["", "first-block:", "first-block:0", "first-block:-1", "first-block:inf", "first-block:nan", "first-block:1.1", "first-block:a", "mag", "FIRST-BLOCK"])  # fmt: skip
def test_other_caches_are_refused(typed: str):
    with pytest.raises(UsageError, match=r"--cache takes first-block or first-block:THRESHOLD") as raised:
        normal_cache(typed)
    assert "\n" not in str(raised.value)


def test_few_steps_are_warned_of_and_four_refused(pipe_dir: Path, capsys):
    layout = read_layout(pipe_dir)
    for steps, warned in ((12, False), (11, True), (5, True)):
        settings = resolve_settings(layout, {"steps": steps}, cache="first-block")
        assert settings.cache == "first-block:0.05"
        assert ("expect few skipped steps" in " ".join(capsys.readouterr().err.split())) == warned
    with pytest.raises(UsageError, match="with 4 steps there are none"):
        resolve_settings(layout, {"steps": 4}, cache="first-block")
    with pytest.raises(UsageError, match=r"must be first-block:0\.1, found first-block:0\.10"):
        replace(SETTINGS, cache="first-block:0.10")
