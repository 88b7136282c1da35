"""What replay gathers: Hessians of wide inputs, and which records are replayed at all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization_helpers import FULL, file_digests, make_settings, run

from ptq.checkpoint.manifest import CARD_FILE
from ptq.quantization.calls import spread
from ptq.quantization.collect import COLUMNS, InputCollector
from ptq.store.calibration import CalibrationSet
from ptq.store.records import Record


@pytest.mark.parametrize("k", [64, COLUMNS, COLUMNS + 64, 2 * COLUMNS + 192])
def test_a_hessian_is_the_sum_over_all_tokens(k):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, n, k, generator=generator) for n in (40, 7)]
    collector = InputCollector(5, hessian=True)
    for x in parts:
        collector.update(x)
    stats = collector.stats()
    expected = sum(x[0].double().T @ x[0].double() for x in parts)
    assert stats.h_kk.dtype == torch.float32 and torch.equal(stats.h_kk, stats.h_kk.T)
    torch.testing.assert_close(stats.h_kk.double(), expected, rtol=1e-4, atol=1e-4)
    assert (stats.n_tokens, stats.total_tokens, len(stats.x_tk)) == (47, 47, 10)


def test_a_subsample_stands_for_all_tokens():
    """An unbiased estimate: the sampled tokens count for all; maxima see every token."""
    x = torch.randn(1, 4000, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 17.0)
    every, some = InputCollector(9, hessian=True), InputCollector(9, hessian=True, hessian_tokens=1000)
    for collector in (every, some):
        collector.update(x)
        collector.update(x[:, :500])
    all_tokens, sampled = every.stats(), some.stats()
    assert (all_tokens.n_tokens, sampled.n_tokens) == (4500, 1500)
    assert all_tokens.total_tokens == sampled.total_tokens == 4500
    torch.testing.assert_close(sampled.rms_k, all_tokens.rms_k, rtol=0.1, atol=0)
    assert not torch.equal(sampled.rms_k, all_tokens.rms_k)
    assert torch.equal(sampled.absmax_k, all_tokens.absmax_k)


def test_the_manifest_states_the_tokens(single, single_records, tmp_path):
    found = CalibrationSet(single_records)
    records = found.of_expert("transformer")
    settings = make_settings("hif4", *FULL, "records.hessian_tokens=2", "records.tokens_per_record=1")
    manifest = run(single, single_records, tmp_path / "out", settings)
    counts = {row.layer: (row.tokens, row.sample_tokens) for row in manifest.layers}
    texts = {"attn2.to_k", "attn2.to_v"}
    assert {counts[name] for name in counts.keys() - texts} == {(2 * len(records), len(records))}
    text_tokens, _ = found.tokens(records[0])
    assert {counts[name] for name in texts} == {(min(2, text_tokens) * len(records), len(records))}
    plain = run(single, single_records, tmp_path / "plain", make_settings("hif4", *FULL))
    _, t, h, w = found.shape(records[0])
    video = next(row for row in plain.layers if row.layer == "attn1.to_q")
    text = next(row for row in plain.layers if row.layer == "attn2.to_k")
    assert video.tokens == len(records) * t * (h // 2) * (w // 2)
    assert text.tokens == len(records) * found.tokens(records[0])[0]


def record(index: int, sigma: float) -> Record:
    return Record(
        record=f"{index}",
        file=f"records/{index}.safetensors",
        sample_id="p",
        expert="transformer",
        step=index,
        timestep=1000 * sigma,
        sigma=sigma,
        d_sigma=0.1,
        branch="cond",
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 40))
def test_spread_takes_evenly_from_first_step_to_last(sigmas, limit):
    records = [record(i, sigma) for i, sigma in enumerate(sigmas)]
    found = spread(records, limit)
    assert len(found) == min(limit, len(records))
    assert found == [r for r in records if r in found], "in file order"
    if limit > 1:
        assert {min(sigmas), max(sigmas)} <= {r.sigma for r in found}
    assert spread(records, None) == records


def test_plain_rounding_replays_few_records_and_gives_the_same_codes(single, single_records, tmp_path):
    total = len(CalibrationSet(single_records).of_expert("transformer"))
    few = run(single, single_records, tmp_path / "few", make_settings("hif4"))
    every = run(single, single_records, tmp_path / "every", make_settings("hif4", "records.for_report=1000"))
    full = run(single, single_records, tmp_path / "full", make_settings("hif4", *FULL))
    assert [m.experts[0].records for m in (few, every, full)] == [2, total, total] and total > 2
    weights = [file_digests(tmp_path / name) for name in ("few", "every")]
    cards = [digests.pop(CARD_FILE) for digests in weights]
    assert weights[0] == weights[1] and cards[0] != cards[1], "the card states the error that was measured"
    assert few.experts[0].denoiser_error == pytest.approx(every.experts[0].denoiser_error, rel=0.5)
