"""The clipping search against exhaustive search, and on unusual weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ptq import formats
from ptq.scheme import hif4_search, native
from ptq.solvers import SolverError, round_to_nearest, round_to_scales, search_scales

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def nearest_error(x: Tensor, grid: Tensor, weights: Tensor) -> float:
    error = (x.abs()[:, None] - grid[None]).abs().amin(-1)
    return float((error.square() * weights).sum())


def brute_mxfp4(group: Tensor, weights: Tensor) -> float:
    floor = torch.floor(torch.log2(group.abs().max())) - 2
    return min(nearest_error(group, E2M1 * 2.0 ** (floor + c), weights) for c in (-1, 0, 1))


def brute_hif4(group: Tensor, weights: Tensor) -> float:
    reference = int(formats.get("hif4").quantize(group.float()[None]).scales) & 0xFF
    best = float("inf")
    for byte in range(max(reference - 4, 0), min(reference + 2, 254) + 1):
        scale = 2.0 ** ((byte >> 2) - 48) * (1 + (byte & 3) / 4)
        total = 0.0
        for i in range(0, 64, 8):
            total += min(
                sum(
                    nearest_error(
                        group[i + 4 * q : i + 4 * q + 4],
                        torch.arange(8, dtype=torch.float64) / 4 * 2.0 ** (e8 + e16[q]) * scale,
                        weights[i + 4 * q : i + 4 * q + 4],
                    )
                    for q in range(2)
                )
                for e8, *e16 in itertools.product((0, 1), repeat=3)
            )
        best = min(best, total)
    return best


BRUTE = {"mxfp4": brute_mxfp4, "hif4": brute_hif4}


def samples(groups: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(groups, size, generator=generator)
    w[::3] *= torch.exp(torch.randn(w[::3].shape, generator=generator))
    w[1::3] *= torch.logspace(-9, 4, len(w[1::3])).unsqueeze(-1)
    return w


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("weighted", [True, False])
def test_search_equals_exhaustive_search(name: str, weighted: bool) -> None:
    fmt = formats.get(name)
    size = fmt.group_size
    w = samples(24, size).reshape(12, 2 * size)
    weights = torch.rand(2 * size, generator=torch.Generator().manual_seed(4)) + 0.1
    scales = search_scales(w, fmt, weights_k=weights if weighted else None)
    error = (fmt.dequantize(round_to_scales(w, scales, fmt)) - w).double().square()
    used = (weights if weighted else torch.ones_like(weights)).double()
    found = (error * used).reshape(-1, size).sum(-1)
    groups, group_weights = w.double().reshape(-1, size), used.expand(12, -1).reshape(-1, size)
    expected = [BRUTE[name](g, v) for g, v in zip(groups, group_weights, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "gain_db"), [("mxfp4", 0.2), ("hif4", 0.35)])
def test_gain_on_gaussians(name: str, gain_db: float) -> None:
    fmt = formats.get(name)
    w = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
    before = (fmt.dequantize(round_to_nearest(w, fmt)) - w).square().sum()
    after = (fmt.dequantize(round_to_scales(w, search_scales(w, fmt), fmt)) - w).square().sum()
    assert 10 * torch.log10(before / after) > gain_db


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_columns_that_matter_decide(name: str) -> None:
    fmt = formats.get(name)
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weights = torch.full((128,), 1e-3)
    weights[::8] = 1.0
    errors = [
        (fmt.dequantize(round_to_scales(w, search_scales(w, fmt, weights_k=v), fmt)) - w)[:, ::8].square().sum()
        for v in (weights, None)
    ]
    assert errors[0] < 0.92 * errors[1]


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_chunks_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, w = formats.get(name), samples(40, 128)
    whole = search_scales(w, fmt)
    monkeypatch.setattr(type(fmt), "search_elements", 1)
    assert torch.equal(search_scales(w, fmt), whole)


@pytest.mark.parametrize("rule", [None, "p2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_compiled_search_of_hif4_chooses_what_the_eager_one_does(rule, weighted, monkeypatch) -> None:
    fmt, generator = formats.get("hif4"), torch.Generator().manual_seed(0)
    w = torch.randn(300, 1024, generator=generator) * torch.exp(2 * torch.randn(300, 1024, generator=generator))
    w[0], w[1, 64:] = 0.0, 0.0
    w[2:40] *= torch.logspace(-45, 35, 38).unsqueeze(1)
    weights = torch.rand(1024, generator=generator) ** 4 if weighted else None
    monkeypatch.setattr(native, "PART_ELEMENTS", 2**14)  # parts that begin inside a row
    torch.set_num_threads(2)
    found = search_scales(w, fmt, weights_k=weights, scale_rule=rule)
    torch.set_num_threads(1)
    monkeypatch.setattr(hif4_search, "searched_natively", hif4_search.searched)
    assert torch.equal(found, search_scales(w, fmt, weights_k=weights, scale_rule=rule))
    assert len(found.unique()) > 1000


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("value", [0.0, 1e-38, 3e5, 1e30])
def test_extreme_magnitudes_are_never_worse_than_the_reference(name: str, value: float) -> None:
    fmt = formats.get(name)
    w = torch.full((2, 128), value)
    w[:, ::5] *= -0.3
    scales = search_scales(w, fmt)
    searched = (fmt.dequantize(round_to_scales(w, scales, fmt)) - w).double().square().sum()
    assert searched <= (fmt.dequantize(round_to_nearest(w, fmt)) - w).double().square().sum() * (1 + 1e-6)
    assert torch.isfinite(fmt.dequantize(round_to_scales(w, scales, fmt))).all()


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_channels_never_seen_keep_sane_scales(name: str) -> None:
    fmt = formats.get(name)
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(128)
    seen[64:] = 0
    scales = search_scales(w, fmt, weights_k=seen)
    assert torch.equal(scales, search_scales(w, fmt))
    assert torch.equal(search_scales(w, fmt, weights_k=torch.zeros(128)), search_scales(w, fmt))


def test_bad_input() -> None:
    fmt, w = formats.get("hif4"), torch.ones(2, 64)
    with pytest.raises(SolverError, match="64 numbers"):
        search_scales(w, fmt, weights_k=torch.ones(32))
    with pytest.raises(SolverError, match="minimum -1"):
        search_scales(w, fmt, weights_k=-torch.ones(64))
    with pytest.raises(SolverError, match="NaN"):
        search_scales(w * torch.nan, fmt)
    with pytest.raises(formats.FormatError, match="multiple of 64"):
        search_scales(torch.ones(2, 32), fmt)
