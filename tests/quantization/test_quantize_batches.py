"""Short records run through a block several at a time, and every figure stays that of single records."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization_helpers import LEARNED, make_settings, run

from ptq.quantization import block as block_module
from ptq.quantization import calls
from ptq.quantization.block import collect_statistics, find_and_collect
from ptq.quantization.calls import BATCH_TOKENS, ExpertCalls, neighbours
from ptq.quantization.collect import InputCollector
from ptq.quantization.job import Job
from ptq.store.calibration import CalibrationSet
from ptq.wan.estimates import CallSize
from ptq.wan.layout import read_layout

SAMPLED = ("records.hessian_tokens=5", "records.tokens_per_record=3")


def size(tokens: int, text: int = 0) -> CallSize:
    return CallSize(tokens, text, (16, 1, 1, tokens))


@given(st.lists(st.tuples(st.sampled_from([1, 40, 700, 1024, 1025, 5000]), st.sampled_from([0, 24])), max_size=60))
def test_batches_are_neighbours_of_one_size_within_the_limit(shapes):
    sizes = [size(*shape) for shape in shapes]
    parts = [sizes[part] for part in neighbours(sizes)]
    assert [one for part in parts for one in part] == sizes
    for part in parts:
        assert len(set(part)) == 1
        assert len(part) == 1 or len(part) * (part[0].tokens + part[0].text) <= BATCH_TOKENS
    for before, after in itertools.pairwise(parts):
        room = BATCH_TOKENS - len(before) * (before[0].tokens + before[0].text)
        assert before[0] != after[0] or room < before[0].tokens + before[0].text, "no smaller than needed"


def test_records_of_1560_tokens_and_as_many_of_another_shape_go_alone():
    assert neighbours([size(1560)] * 3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    lying = CallSize(40, 0, (16, 1, 2, 20))
    assert neighbours([size(40), lying]) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_updates_is_the_updates(dtype):
    """Bit for bit, the subsamples of every record included."""
    x = torch.randn(4, 30, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, batched = (InputCollector(7, hessian=True, hessian_tokens=11, seed=3) for _ in range(2))
    for record in x:
        one.update(record.unsqueeze(0))
    batched.update(x, batched=True)
    expected, found = one.stats(), batched.stats()
    assert (found.n_tokens, found.total_tokens, len(found.x_tk)) == (44, 120, 28)
    for name in ("h_kk", "absmax_k", "x_tk"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_samples_are_copies():
    """The model may write over its activations once they have been seen."""
    x = torch.randn(2, 5, 64)
    collector = InputCollector(100, hessian=False)
    collector.update(x, batched=True)
    expected = x.reshape(-1, 64).clone()
    x.zero_()
    assert torch.equal(collector.stats().x_tk, expected)


def replayed(model: Path, records: Path, expert: str, out: Path, *overrides: str) -> dict[str, Any]:
    """Statistics of block 0, the stream behind it, and errors of another stream whose records are changed unequally."""
    job = Job(read_layout(model), CalibrationSet(records), make_settings("hif4", *LEARNED, *overrides), out)
    replay = job.replay(expert)
    own = ExpertCalls(expert, replay, job.calibration)
    stream, block = own.start(), replay.load_block(0)
    groups, collectors = find_and_collect(
        block, job.packed(expert).targets, own.batches, stream, job.settings, replay.device
    )
    changed, number = own.copy(stream), 0
    for batch in own.batches:
        for hidden in changed[batch.name]:
            noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(number))
            hidden.add_(noise, alpha=0.1 * number)
            number += 1
    return {
        "groups": [group.names for group in groups],
        "sizes": [len(batch.records) for batch in own.batches],
        "stats": {name: collector.stats() for name, collector in collectors.items()},
        "stream": torch.cat([stream[batch.name] for batch in own.batches]),
        "energy": own.output_energy(stream),
        "error": own.output_error(stream, changed),
    }


@pytest.mark.parametrize("case", ["t2v", "ti2v"])
def test_replay_in_batches_gives_what_single_records_give(request, case, tmp_path, monkeypatch):
    """Two experts, and one that gives every token a timestep of its own."""
    model, records = (
        request.getfixturevalue(name)
        for name in {"t2v": ("model", "records"), "ti2v": ("single", "single_records")}[case]
    )
    expert = list(read_layout(model).experts)[-1]
    monkeypatch.setattr(calls, "BATCH_TOKENS", 150)
    batched = replayed(model, records, expert, tmp_path, *SAMPLED)
    assert max(batched["sizes"]) > 1 and len(batched["sizes"]) > 1
    monkeypatch.setattr(calls, "BATCH_TOKENS", 1)
    single = replayed(model, records, expert, tmp_path, *SAMPLED)
    assert set(single["sizes"]) == {1} and sum(single["sizes"]) == sum(batched["sizes"])
    assert batched["groups"] == single["groups"] and len(batched["groups"]) == 7
    torch.testing.assert_close(batched["stream"], single["stream"], rtol=1e-5, atol=1e-6)
    assert batched["energy"] == pytest.approx(single["energy"], rel=1e-5)
    assert batched["error"] == pytest.approx(single["error"], rel=1e-4) and single["error"] > 1e-4
    for name, expected in single["stats"].items():
        found = batched["stats"][name]
        assert (found.n_tokens, found.total_tokens) == (expected.n_tokens, expected.total_tokens)
        for part in ("x_tk", "absmax_k", "h_kk"):  # the same tokens of the same records
            torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-4, atol=1e-5)


def test_inputs_are_found_without_another_forward(model, records, tmp_path, monkeypatch):
    """Each batch passes each block twice: once as the original, once quantized."""
    passed = []
    original = block_module.run_block
    monkeypatch.setattr(block_module, "run_block", lambda *arguments: passed.append(1) or original(*arguments))
    monkeypatch.setattr(calls, "BATCH_TOKENS", 100)
    manifest = run(model, records, tmp_path / "out", make_settings("mxfp4", *LEARNED))
    batches = sum(-(-expert.records // 3) for expert in manifest.experts)  # of 28 tokens
    assert len(passed) == 2 * 3 * batches


def test_found_inputs_have_the_statistics_of_known_ones(model, records, tmp_path, monkeypatch):
    """The first block of a run and the first of a resumed one: bit for bit, or a resumed run would leave other codes."""
    monkeypatch.setattr(calls, "BATCH_TOKENS", 100)
    settings = make_settings("hif4", *LEARNED, *SAMPLED)
    job = Job(read_layout(model), CalibrationSet(records), settings, tmp_path / "out")
    replay = job.replay("transformer")
    own = ExpertCalls("transformer", replay, job.calibration)
    block, targets = replay.load_block(0), job.packed("transformer").targets
    groups, found = find_and_collect(block, targets, own.batches, own.start(), settings, replay.device)
    known = collect_statistics(block, groups, own.batches, own.start(), settings, replay.device)
    assert list(found) == list(known) == [group.names[0] for group in groups]
    for name in known:
        one, other = found[name].stats(), known[name].stats()
        assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("h_kk", "absmax_k", "x_tk"))
