"""Runs of other seeds than the default: `ptq verify` computes them again by the scheme, with nothing taken from the archive."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from submission_helpers import Job, Tampered

from ptq import generation
from ptq.errors import DamagedFileError, PtqError
from ptq.prompts import make_sample
from ptq.store.evaluation import ROLES
from ptq.submission.check import NotCheckedError
from ptq.submission.repeat import _generate, check_unit
from ptq.submission.runs import check_pairing
from ptq.tiny.grammar import held_out_prompts
from ptq.wan.loading import resolve_model

GIVEN = {"steps": 1, "num_frames": 5}


def make_runs(job: Job, root: Path, samples: int, latent: Path | None = None, **chosen: Any) -> Path:
    """Both runs of two prompts, in the order that makes the second by name the first."""
    prompts = sorted((make_sample(text) for text in held_out_prompts(2)), key=lambda one: one.id, reverse=True)
    for role, model in (("reference", "tiny"), ("candidate", str(job.checkpoint))):
        layout = resolve_model(model)
        settings = generation.resolve_settings(layout, GIVEN, **chosen)
        settings, fixed = generation.start_from(latent, layout, settings)
        identity = generation.identify_model(model, layout.path)
        options = {"samples_per_prompt": samples, "fixed": fixed}
        generation.make_videos(layout, prompts, settings, root / role, model=identity, **options)
    return root


@pytest.fixture(scope="module")
def by_vbench(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(job, tmp_path_factory.mktemp("vbench"), 2, seed_scheme="vbench")


def with_runs(tampered: Tampered, runs: Path) -> Tampered:
    """The submission with these runs in the place of its own."""
    for role in ROLES:
        target = tampered.root / "runs" / role
        shutil.rmtree(target)
        shutil.copytree(runs / role, target, ignore=shutil.ignore_patterns("state"))
    return tampered


def edit_seeds(tampered: Tampered, change: Callable[[int], int]) -> None:
    def edit(lines: list[Any]) -> None:
        for line in lines:
            line["seed"] = change(line["seed"])

    for role in ROLES:
        tampered.edit_lines(f"runs/{role}/manifest-0of1.jsonl", edit)


def test_seeds_by_scheme_vbench_hold_and_are_generated_again(by_vbench: Path, tampered: Tampered) -> None:
    contents = with_runs(tampered, by_vbench).contents()
    found = check_pairing(contents)
    assert found.startswith("4 units, seeds computed again") and "compare the order of the prompts" in found
    last = next(name for name, line in contents.lines["candidate"].items() if line.seed == 100001)
    assert _generate(contents, "candidate", last, "cpu", contents.weights, contents.identity).units.keys() == {last}


@pytest.mark.parametrize(
    "change",
    [
        lambda seed: seed + 100_000 * (seed >= 100_000),  # a prompt's number left out: the best of more seeds
        lambda seed: seed + 100_000,  # not from 0
        lambda seed: 2 * seed,  # samples 0 and 2
        lambda seed: seed % 100_000,  # both prompts with one number
    ],
)
def test_other_seeds_do_not_hold(by_vbench: Path, tampered: Tampered, change: Callable[[int], int]) -> None:
    edit_seeds(with_runs(tampered, by_vbench), change)
    with pytest.raises(DamagedFileError, match=r"says seed = \d+, its run and name give \d+"):
        check_pairing(tampered.contents())


def test_seeds_of_another_order_are_found_when_a_unit_is_generated_again(by_vbench: Path, tampered: Tampered) -> None:
    edit_seeds(with_runs(tampered, by_vbench), lambda seed: (seed + 100_000) % 200_000)
    contents = tampered.contents()
    check_pairing(contents)
    with pytest.raises(DamagedFileError, match="latent_sha256"):
        _generate(
            contents, "candidate", next(iter(contents.lines["candidate"])), "cpu", contents.weights, contents.identity
        )


def test_the_scheme_is_the_one_of_the_run(by_vbench: Path, tampered: Tampered) -> None:
    with_runs(tampered, by_vbench)
    for change, words in (
        ({"seed_scheme": "unit"}, "says seed = "),
        ({"seed_scheme": "same"}, "all 2 samples of a prompt would be one video"),
        ({"seed_scheme": "best"}, "--seed-scheme takes unit, vbench, same"),
        ({"seed_scheme": "vbench", "fixed_latent": "none"}, "SHA-256 in hex digits"),
    ):
        for role in ROLES:
            tampered.edit(f"runs/{role}/run.json", lambda info, new=change: info["settings"].update(new))
        with pytest.raises(PtqError, match=words):
            check_pairing(tampered.contents())


def test_one_latent_for_all_is_the_one_of_the_settings(job: Job, tampered: Tampered, tmp_path: Path) -> None:
    shape = resolve_model("tiny").latent_shape(64, 64, 5)
    save_file({"latents": np.random.default_rng(0).normal(size=shape).astype(np.float32)}, tmp_path / "a.safetensors")
    with_runs(tampered, make_runs(job, tmp_path / "runs", 1, tmp_path / "a.safetensors"))
    contents = tampered.contents()
    assert check_pairing(contents).startswith("2 units")
    with pytest.raises(NotCheckedError, match="starts from one latent, and its file is not in the archive"):
        check_unit(contents)
    for role in ROLES:
        tampered.edit_lines(f"runs/{role}/manifest-0of1.jsonl", lambda lines: lines[1].update(latent_sha256="0" * 64))
    with pytest.raises(DamagedFileError, match="does not start from the noise that all units should have"):
        check_pairing(tampered.contents())
