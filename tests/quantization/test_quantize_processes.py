"""Several processes on one run: they share out the Linears of a block and leave the codes of one process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from children import start_child
from hypothesis import given
from hypothesis import strategies as st
from quantization_helpers import (
    FULL,
    file_digests,
    make_settings,
    manifest_facts,
    run,
    run_in_small_batches,
    shipped,
)

from ptq.quantization import block, calls
from ptq.quantization.processes import Processes


def as_rank(rank: int, size: int, port: int, log: Path, *arguments: object) -> None:
    """Quantize as a launcher would start it; writes how many inputs this process solved."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    solved = [0]
    solve = block.solve_group

    def counted(*args: object):
        solved[0] += 1
        return solve(*args)

    block.solve_group = counted
    run(*arguments)
    (log / str(rank)).write_text(str(solved[0]))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("recipe", ["full", "hif4", "mxfp4", "hif4-fast"])
def test_two_processes_give_the_codes_of_one(request, tmp_path, recipe, monkeypatch):
    names = ("model", "records", "uninterrupted") if recipe == "full" else ("single", "single_records")
    model, records, *made = map(request.getfixturevalue, names)
    if made:
        whole, settings, batches, blocks = made[0]["full"], make_settings("hif4", *FULL), (), 2 * 3
    else:
        settings = shipped(recipe, *(["solver.residual=0.3", "solver.tune.steps=2"] if recipe == "hif4-fast" else []))
        whole, batches, blocks = tmp_path / "whole", (run_in_small_batches,), 2
        monkeypatch.setattr(calls, "BATCH_TOKENS", 100)
        run(model, records, whole, settings)
    port, arguments = free_port(), (tmp_path, model, records, tmp_path / "out", settings)
    children = [start_child(*batches, as_rank, rank, 2, port, *arguments) for rank in range(2)]
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0, 0]
    assert file_digests(tmp_path / "out") == file_digests(whole)
    assert manifest_facts(tmp_path / "out") == manifest_facts(whole)
    solved = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert sum(solved) == blocks * 7 and min(solved) > 0


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e9), max_size=12), st.integers(1, 5))
def test_every_input_has_one_owner_and_the_load_is_shared(costs, size):
    owned = [Processes(rank, size).own(costs) for rank in range(size)]
    assert sorted(name for names in owned for name in names) == sorted(costs)
    loads = [sum(costs[name] for name in names) for names in owned]
    # Whoever ends last was the least loaded when it took its last input (Graham 1966).
    assert max(loads) <= sum(costs.values()) / size + max(costs.values(), default=0.0) + 1e-6
