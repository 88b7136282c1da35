"""Killed anywhere and run again, quantize ends with the bytes of an uninterrupted run; changed inputs are refused."""

import random
import shutil
import time
from pathlib import Path

import pytest
from children import start_child
from quantization_helpers import (
    FULL,
    file_digests,
    make_records,
    make_settings,
    manifest_facts,
    run,
    run_and_die,
    run_in_small_batches,
    shipped,
)

from ptq.errors import DamagedFileError, UsageError
from ptq.quantization import calls
from ptq.quantization import expert as expert_module
from ptq.store.files import read_json, write_json
from ptq.version import __version__

SETTINGS = {"rtn": make_settings("mxfp4"), "full": make_settings("hif4", *FULL)}


def blocks_done(out: Path) -> int:
    return len(list(out.with_name(out.name + ".partial").glob("blocks/*/?????.json")))


@pytest.mark.parametrize("recipe", ["rtn", "full"])
def test_killed_at_a_random_block(model, records, uninterrupted, recipe, tmp_path):
    out = tmp_path / "out"
    wanted = random.Random(recipe).randint(1, 5)
    child = start_child(run, model, records, out, SETTINGS[recipe])
    deadline = time.monotonic() + 120
    while blocks_done(out) < wanted and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    child.kill()
    child.join()
    assert wanted <= blocks_done(out) < 6 and not out.exists()
    run(model, records, out, SETTINGS[recipe])
    assert file_digests(out) == file_digests(uninterrupted[recipe])
    assert manifest_facts(out) == manifest_facts(uninterrupted[recipe])
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("recipe", ["hif4", "mxfp4", "hif4-fast"])
def test_killed_again_and_again_in_the_middle_of_writes(single, single_records, tmp_path, recipe, monkeypatch):
    settings = shipped(recipe)
    monkeypatch.setattr(calls, "BATCH_TOKENS", 100)
    run(single, single_records, tmp_path / "whole", settings)
    out = tmp_path / "out"
    # Writing: statistics of block 0; tensors of block 1; statistics of block 1; the index of the shards; the manifest.
    for renames in (3, 3, 2, 4, 5):
        child = start_child(run_in_small_batches, run_and_die, renames, single, single_records, out, settings)
        child.join(120)
        assert child.exitcode == -9 and not out.exists()
    run(single, single_records, out, settings)
    assert file_digests(out) == file_digests(tmp_path / "whole")
    assert manifest_facts(out) == manifest_facts(tmp_path / "whole")


def stop_after(monkeypatch, blocks: int) -> None:
    """Make the next run fail after so many finished blocks."""
    original, left = expert_module.BlockWriter.put, [blocks]

    def put(self, *arguments):
        original(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(expert_module.BlockWriter, "put", put)


@pytest.fixture
def unfinished(model, records, tmp_path, monkeypatch) -> Path:
    """The output path of a run that stopped after four of six blocks."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        run(model, records, out, SETTINGS["full"])
    assert blocks_done(out) == 4
    return out


def test_finished_blocks_are_not_solved_again(model, records, uninterrupted, unfinished, monkeypatch):
    solved = []
    original = expert_module.solve_block
    monkeypatch.setattr(expert_module, "solve_block", lambda *a: solved.append(1) or original(*a))
    run(model, records, unfinished, SETTINGS["full"])
    assert len(solved) == 2
    assert file_digests(unfinished) == file_digests(uninterrupted["full"])


@pytest.mark.parametrize("damage", ["truncated", "removed", "statistics"])
def test_a_damaged_block_is_made_again(model, records, uninterrupted, unfinished, damage):
    block = unfinished.with_name("out.partial") / "blocks" / "transformer" / "00001.safetensors"
    if damage == "truncated":
        block.write_bytes(block.read_bytes()[:-10])
    elif damage == "removed":
        block.unlink()
    else:
        block.with_suffix(".json").write_text('{"block"')
    run(model, records, unfinished, SETTINGS["full"])
    assert file_digests(unfinished) == file_digests(uninterrupted["full"])


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        (make_settings("hif4", *FULL, "solver.damping=0.02"), "recipe.solver.damping"),
        (make_settings("mxfp4", *FULL), "format"),
        (make_settings("hif4", *FULL, seed=1), "seed"),
        (make_settings("hif4", *FULL, protected={"transformer": {0: "named"}}), "high_precision"),
    ],
)
def test_other_settings_are_refused_by_name(model, records, uninterrupted, unfinished, settings, difference):
    with pytest.raises(UsageError, match=rf"unfinished run.* different: {difference}\b.*--fresh"):
        run(model, records, unfinished, settings)
    assert blocks_done(unfinished) == 4
    run(model, records, unfinished, SETTINGS["full"])
    assert file_digests(unfinished) == file_digests(uninterrupted["full"])


def test_other_records_are_refused_and_fresh_starts_over(model, unfinished, tmp_path):
    others = make_records(model, tmp_path / "others", prompts=2).directory
    with pytest.raises(UsageError, match=r"different: calibration\."):
        run(model, others, unfinished, SETTINGS["full"])
    run(model, others, unfinished, SETTINGS["full"], fresh=True)
    run(model, others, tmp_path / "direct", SETTINGS["full"])
    assert file_digests(unfinished) == file_digests(tmp_path / "direct")


def test_only_the_final_rename_was_missing(model, records, uninterrupted, tmp_path, monkeypatch):
    partial = tmp_path / "out.partial"
    shutil.copytree(uninterrupted["full"], partial)
    monkeypatch.setattr(expert_module.ExpertRun, "run", None)  # nothing may be replayed
    run(model, records, tmp_path / "out", SETTINGS["full"])
    assert file_digests(tmp_path / "out") == file_digests(uninterrupted["full"])


def begin(model: Path, records: Path, out: Path) -> Path:
    """A run that was killed after its first block; returns its settings file."""
    child = start_child(run_and_die, 5, model, records, out, SETTINGS["rtn"])
    child.join(120)
    assert blocks_done(out) == 1
    return out.with_name("out.partial") / "run.json"


def test_a_run_that_another_version_began_is_refused_and_fresh_starts_over(model, records, uninterrupted, tmp_path):
    """Its codes may differ by the order of sums; whatever else it says differently, the version is the reason."""
    out = tmp_path / "out"
    signature = begin(model, records, out)
    begun = read_json(signature)
    begun["versions"]["wan-ptq"], begun["recipe"] = "0.1.0", {"rounding": "rtn", "rotation": 0}
    write_json(signature, begun)
    before = file_digests(signature.parent)
    with pytest.raises(UsageError, match=rf"of wan-ptq 0\.1\.0, and this is {__version__}, .*began it.*--fresh"):
        run(model, records, out, SETTINGS["rtn"])
    assert file_digests(signature.parent) == before
    run(model, records, out, SETTINGS["rtn"], fresh=True)
    assert file_digests(out) == file_digests(uninterrupted["rtn"])


def test_a_damaged_settings_file_is_refused_and_fresh_starts_over(model, records, uninterrupted, tmp_path):
    out = tmp_path / "out"
    signature = begin(model, records, out)
    for content in ("{}", "[]", '{"versions": null}', '{"versions": [], "format": "hif4"}'):
        signature.write_text(content)
        with pytest.raises(DamagedFileError, match=r"run\.json does not say.*--fresh"):
            run(model, records, out, SETTINGS["rtn"])
    run(model, records, out, SETTINGS["rtn"], fresh=True)
    assert file_digests(out) == file_digests(uninterrupted["rtn"])


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_of_something_else_is_left_alone(model, records, tmp_path, fresh):
    thesis = tmp_path / "out.partial" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(UsageError, match="holds other files"):
        run(model, records, tmp_path / "out", SETTINGS["rtn"], fresh=fresh)
    assert thesis.read_text() == "years of work" and list(thesis.parent.iterdir()) == [thesis]
