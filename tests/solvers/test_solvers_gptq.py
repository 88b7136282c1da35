"""GPTQ against an independent column-by-column reference, and its behaviour on difficult Hessians."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq import formats
from ptq.solvers import Factor, SolverError, factorize, gptq, round_to_nearest, round_to_scales
from ptq.solvers.gptq import rounded_from
from ptq.solvers.measure import trace_errors

FORMATS = ("mxfp4", "hif4")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
GRIDS = {"mxfp4": E2M1, "hif4": torch.arange(8, dtype=torch.float64)}


def correlated(tokens: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + 0.5 * torch.eye(k)
    scale = torch.exp(0.7 * torch.randn(k, generator=generator))
    return torch.randn(tokens, k, generator=generator) @ mixing * scale


def hessian(k: int, seed: int = 0, tokens: int | None = None) -> Tensor:
    x = correlated(tokens or 4 * k, k, seed).double()
    return x.T @ x


def factored(h_kk: Tensor, damping: float = 0.01, act_order: bool = True, dtype: torch.dtype = torch.float64) -> Factor:
    return factorize(h_kk, damping=damping, act_order=act_order, dtype=dtype)


def weight(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def obq(w_nk: Tensor, h_kk: Tensor, fmt: formats.Format, scales: Tensor, order: list[int]) -> tuple[Tensor, Tensor]:
    """Optimal Brain Quantization in a fixed order, as published: invert the Hessian of what is left, round one column,
    spread its error, remove it. Values on the grid found by exhaustive comparison, and what each was rounded from; float64 [N, K]."""
    w = w_nk.double().clone()
    target = torch.empty_like(w)
    steps = fmt.steps(scales).double()
    grid = torch.cat((-GRIDS[fmt.name].flip(0), GRIDS[fmt.name]))
    remaining = list(order)
    for column in order:
        inverse = torch.linalg.inv(h_kk[remaining][:, remaining])
        levels = grid * steps[:, column, None]
        nearest = (w[:, column, None] - levels).abs().argmin(-1, keepdim=True)
        rounded = levels.gather(1, nearest)[:, 0]
        at = remaining.index(column)
        target[:, column] = w[:, column]
        error = (w[:, column] - rounded) / inverse[at, at]
        w[:, remaining] -= error[:, None] * inverse[at][None]
        w[:, column] = rounded
        remaining.remove(column)
    return w, target


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_column_by_column_reference(name: str, act_order: bool, seed: int) -> None:
    fmt = formats.get(name)
    w, h = weight(9, 128, seed + 10), hessian(128, seed)
    scales = round_to_nearest(w, fmt).scales
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(128)
    order = torch.argsort(h.diagonal(), descending=True).tolist() if act_order else list(range(128))
    expected, target = obq(w, damped, fmt, scales, order)
    factor = factored(h, act_order=act_order)
    codes = gptq(w, factor, fmt, scales=scales, block_columns=48).codes
    assert torch.equal(fmt.dequantize(codes).double(), expected)
    torch.testing.assert_close(rounded_from(w, codes, factor, fmt), target.float(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(codes.elements, round_to_scales(w, scales, fmt).elements)


@pytest.mark.parametrize("name", FORMATS)
def test_identity_hessian_rounds_to_nearest(name: str) -> None:
    fmt, w = formats.get(name), weight(16, 256)
    rtn = round_to_nearest(w, fmt)
    codes = gptq(w, factored(torch.eye(256), dtype=torch.float32), fmt, scales=rtn.scales).codes
    assert torch.equal(codes.elements, round_to_scales(w, rtn.scales, fmt).elements)
    if name == "mxfp4":
        assert torch.equal(codes.elements, rtn.elements)


def test_hif4_reference_rounding_is_rarely_not_nearest() -> None:
    fmt, w = formats.get("hif4"), weight(256, 1024)
    rtn = round_to_nearest(w, fmt)
    different = (round_to_scales(w, rtn.scales, fmt).elements != rtn.elements).float().mean()
    assert 0 < different < 0.02


@pytest.mark.parametrize("name", FORMATS)
def test_act_order_ignores_the_order_of_groups(name: str) -> None:
    fmt = formats.get(name)
    groups, k = 5, 5 * fmt.group_size
    w, h = weight(8, k), hessian(k)
    scales = round_to_nearest(w, fmt).scales
    shuffled_groups = torch.tensor([3, 0, 4, 1, 2])
    columns = torch.arange(k).reshape(groups, -1)[shuffled_groups].flatten()
    straight = gptq(w, factored(h), fmt, scales=scales).codes
    shuffled = gptq(w[:, columns], factored(h[columns][:, columns]), fmt, scales=scales[:, shuffled_groups]).codes
    assert torch.equal(straight.elements[:, columns], shuffled.elements)


@pytest.mark.parametrize("name", FORMATS)
def test_block_size_and_shared_factor_do_not_change_codes(name: str) -> None:
    fmt = formats.get(name)
    w, h = weight(12, 256), hessian(256)
    scales = round_to_nearest(w, fmt).scales
    factor = factored(h)
    whole = gptq(w, factor, fmt, scales=scales).codes.elements
    for block in (1, 7, 128, 1000):
        assert torch.equal(gptq(w, factor, fmt, scales=scales, block_columns=block).codes.elements, whole)
    parts = [gptq(w[i : i + 4], factored(h), fmt, scales=scales[i : i + 4]).codes for i in (0, 4, 8)]
    assert torch.equal(torch.cat([part.elements for part in parts]), whole)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_survive_packing_and_keep_their_scales(name: str) -> None:
    fmt = formats.get(name)
    w, h = weight(8, 128), hessian(128)
    scales = round_to_nearest(w, fmt).scales
    codes = gptq(w, factored(h, dtype=torch.float32), fmt, scales=scales).codes
    unpacked = fmt.unpack(*fmt.pack(codes))
    assert torch.equal(unpacked.elements, codes.elements)
    assert torch.equal(codes.scales, scales)
    assert not (codes.elements == 8).any(), "-0 is never written"
    # Rounding the decoded weight again on the same scales changes nothing: it is on the grid.
    assert torch.equal(round_to_scales(fmt.dequantize(codes), scales, fmt).elements, codes.elements)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reported_errors_are_those_of_the_codes(name: str, act_order: bool, dtype: torch.dtype) -> None:
    """Errors over the tokens, without damping, from what was rounded away; two columns are dead."""
    fmt, w, x = formats.get(name), weight(48, 256), correlated(512, 256)
    x[:, [3, 200]] = 0
    h = x.T @ x
    solved = gptq(w, factored(h, act_order=act_order, dtype=dtype), fmt, scales=round_to_nearest(w, fmt).scales)
    error = fmt.dequantize(solved.codes).double() - w
    torch.testing.assert_close(solved.trace_n, ((error @ h.double()) * error).sum(1), rtol=2e-5, atol=0.0)
    torch.testing.assert_close(solved.error_n, error.square().sum(1), rtol=2e-5, atol=0.0)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 10**6), st.sampled_from([20, 200, 1000]))
def test_mean_error_is_below_rounding_to_nearest(name: str, seed: int, tokens: int) -> None:
    fmt = formats.get(name)
    w, h = weight(32, 128, seed), hessian(128, seed, tokens)
    scales = round_to_nearest(w, fmt).scales
    solved = gptq(w, factored(h, dtype=torch.float32), fmt, scales=scales).codes
    rtn = round_to_scales(w, scales, fmt)
    errors = [float(trace_errors(fmt.dequantize(codes) - w, h).sum()) for codes in (solved, rtn)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("name", FORMATS)
def test_dead_channels_are_rounded_to_nearest_and_leave_the_others_alone(name: str) -> None:
    fmt = formats.get(name)
    w, x = weight(8, 128), correlated(512, 128)
    dead = torch.tensor([0, 5, 64, 127])
    x[:, dead] = 0
    h = x.T @ x
    scales = round_to_nearest(w, fmt).scales
    factor = factored(h)
    codes = gptq(w, factor, fmt, scales=scales).codes
    assert factor.dead_columns == 4
    nearest = round_to_scales(w, scales, fmt).elements
    assert torch.equal(codes.elements[:, dead], nearest[:, dead])
    live = torch.ones(128, dtype=torch.bool)
    live[dead] = False
    other = w.clone()
    other[:, dead] = 0
    again = gptq(other, factor, fmt, scales=scales).codes.elements
    assert torch.equal(again[:, live], codes.elements[:, live])


def test_rounding_noise_beside_a_dead_diagonal_is_ignored() -> None:
    x = correlated(512, 64)
    x[:, 7] = 0
    h = x.T @ x
    noisy = h.clone()
    noisy[7, 8], noisy[8, 7] = 1e-3, 1e-3
    exact, ignored = (factored(one, dtype=torch.float32) for one in (h, noisy))
    assert torch.equal(exact.feedback_kk, ignored.feedback_kk)
    assert torch.equal(exact.pivots_k, ignored.pivots_k)


def test_all_channels_dead_is_rounding_to_nearest() -> None:
    fmt, w = formats.get("mxfp4"), weight(4, 64)
    scales = round_to_nearest(w, fmt).scales
    factor = factored(torch.zeros(64, 64), dtype=torch.float32)
    assert factor.dead_columns == 64
    assert torch.equal(gptq(w, factor, fmt, scales=scales).codes.elements, round_to_scales(w, scales, fmt).elements)


def test_singular_hessian_is_damped_more_and_counted() -> None:
    x = correlated(16, 128).double()  # rank 16 of 128
    h = x.T @ x
    h = h - 2e-4 * h.diagonal().mean() * torch.eye(128)  # and slightly indefinite
    factor = factored(h, damping=1e-6)
    assert factor.damping_retries == 3
    assert factor.damping == pytest.approx(1e-3)
    without = factored(x.T @ x + 1e-9 * torch.eye(128), dtype=torch.float32)
    assert without.damping_retries == 0


@pytest.mark.parametrize("name", FORMATS)
def test_singular_hessian_still_beats_rounding_to_nearest(name: str) -> None:
    fmt, w = formats.get(name), weight(32, 128)
    x = correlated(16, 128)
    h = x.T @ x
    scales = round_to_nearest(w, fmt).scales
    solved = gptq(w, factored(h, damping=0.0, dtype=torch.float32), fmt, scales=scales).codes
    nearest = round_to_scales(w, scales, fmt)
    assert not torch.equal(solved.elements, nearest.elements)
    errors = [float(trace_errors(fmt.dequantize(c) - w, h).sum()) for c in (solved, nearest)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("h", "message"),
    [
        (torch.full((64, 64), torch.nan), "NaN"),
        (torch.diag(torch.tensor([torch.inf] + [1.0] * 63)), "infinite"),
        (torch.eye(64) - 100 * (torch.ones(64, 64) - torch.eye(64)), "no Cholesky factor"),
        (torch.diag(torch.tensor([-1.0] + [1.0] * 63)), "negative diagonal"),
        (torch.ones(64, 32), "square"),
        (torch.eye(32), "64 input channels"),
    ],
)
def test_unusable_hessians_are_errors(h: Tensor, message: str) -> None:
    fmt, w = formats.get("mxfp4"), weight(4, 64)
    with pytest.raises(SolverError, match=message):
        gptq(w, factored(h, dtype=torch.float32), fmt, scales=round_to_nearest(w, fmt).scales)


def test_negative_damping_and_scales_of_another_weight_are_errors() -> None:
    fmt, w = formats.get("mxfp4"), weight(4, 64)
    with pytest.raises(SolverError, match=r"cannot be negative, found -0\.01"):
        factored(torch.eye(64), damping=-0.01)
    with pytest.raises(SolverError, match=r"Scales \[4, 1\] do not fit a mxfp4 weight \[4, 64\]"):
        gptq(w, factored(torch.eye(64)), fmt, scales=round_to_nearest(w[:, :32], fmt).scales)


def test_sums_are_in_the_dtype_of_the_factor() -> None:
    for dtype in (torch.float32, torch.float64):
        factor = factored(hessian(64), dtype=dtype)
        assert factor.feedback_kk.dtype == factor.pivots_k.dtype == dtype


def test_non_finite_weight_is_an_error() -> None:
    w = weight(4, 64)
    w[1, 3] = torch.nan
    with pytest.raises(SolverError, match="1 NaN or infinite"):
        round_to_nearest(w, formats.get("hif4"))


@pytest.mark.parametrize("name", FORMATS)
def test_zero_weight_gives_zero_codes(name: str) -> None:
    fmt = formats.get(name)
    w = torch.zeros(4, 128)
    codes = gptq(w, factored(hessian(128), dtype=torch.float32), fmt, scales=round_to_nearest(w, fmt).scales).codes
    assert not codes.elements.any()
