"""The composition: every ingredient on a group of Linears that share one input."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq import formats
from ptq.runtime.linear import QuantLinear
from ptq.runtime.spec import QuantSpec
from ptq.solvers import InputStats, LayerSolution, SolverError, SolveSettings, solve_group
from ptq.solvers.basis import Basis
from ptq.solvers.measure import trace_errors

K = 128
LEARNED = SolveSettings(rotation=64, learned_transform=True, clip_search=True, bias_correction=True)
ALL = SolveSettings(rotation=32, smoothing=(0.5,), clip_search=True, bias_correction=True)


def tokens(count: int, seed: int = 0, k: int = K) -> Tensor:
    shared = torch.Generator().manual_seed(99)
    mixing = torch.randn(k, k, generator=shared) * torch.logspace(0, -1.5, k) / k**0.5
    scale = torch.exp(0.6 * torch.randn(k, generator=shared))
    scale[::50] *= 20
    mean = 0.4 * torch.randn(k, generator=shared)
    z = torch.randn(count, k, generator=torch.Generator().manual_seed(seed))
    return (z @ mixing.T + mean) * scale


def linears(seed: int = 5, k: int = K) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, k, generator=generator) / k**0.5 for name, n in (("q", 24), ("k", 40), ("v", 16))}


def solve(
    fmt: str, config: SolveSettings, x: Tensor, sample: int | None = None, weights: dict[str, Tensor] | None = None
) -> dict[str, LayerSolution]:
    weights = linears() if weights is None else weights
    biases = {name: torch.ones(len(w)) if name == "q" else None for name, w in weights.items()}
    return solve_group(weights, biases, InputStats.from_tokens(x, sample=sample), formats.get(fmt), config)


def module(fmt: str, config: SolveSettings, solution: LayerSolution) -> QuantLinear:
    spec = QuantSpec(
        fmt,
        config.rotation,
        solution.basis.smooth_k is not None,
        config.activation_scale_rule,
        config.activation_ties,
        solution.basis.learned_gbb is not None,
    )
    return QuantLinear.from_codes(solution.codes, spec, solution.bias, solution.basis.stored)


def held_out_error(fmt: str, config: SolveSettings, solutions: dict[str, LayerSolution], x: Tensor) -> float:
    error = signal = 0.0
    for name, w in linears().items():
        y = x @ w.T + (1.0 if name == "q" else 0.0)
        error += float((module(fmt, config, solutions[name])(x) - y).square().sum())
        signal += float((x @ w.T).square().sum())
    return error / signal


@pytest.mark.parametrize("fmt", ["mxfp4", "hif4"])
def test_gptq_rotation_and_smoothing_help_on_held_out_tokens_and_the_rest_does_no_harm(fmt: str) -> None:
    x, held_out = tokens(2048), tokens(512, seed=1)
    ladder = [
        SolveSettings(rounding="rtn"),
        SolveSettings(rounding="gptq"),
        SolveSettings(rounding="gptq", rotation=32),
        SolveSettings(rounding="gptq", rotation=32, smoothing=(0.5,)),
        ALL,
        LEARNED,
    ]
    errors = [held_out_error(fmt, config, solve(fmt, config, x, sample=256), held_out) for config in ladder]
    assert errors[:4] == sorted(errors[:4], reverse=True)
    assert errors[4] < 1.01 * errors[3] < 0.4 * errors[0]
    assert errors[5] < 0.9 * errors[4]


@pytest.mark.parametrize("fmt", ["mxfp4", "hif4"])
@pytest.mark.parametrize("config", [ALL, LEARNED, SolveSettings(rounding="rtn"), SolveSettings(clip_search=True)])
def test_reported_output_error_is_that_of_the_module(fmt: str, config: SolveSettings) -> None:
    x = tokens(300)
    solutions = solve(fmt, config, x)
    for name, w in linears().items():
        bias = 1.0 if name == "q" else 0.0
        y = module(fmt, config, solutions[name])(x) - bias
        expected = (y - x @ w.T).square().sum() / (x @ w.T).square().sum()
        assert solutions[name].stats["output_error"] == pytest.approx(float(expected), rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    fmt=st.sampled_from(["mxfp4", "hif4"]),
    seed=st.integers(0, 10**6),
    count=st.sampled_from([3, 60, 500]),
    rotation=st.sampled_from([0, 16, 128]),
    clip=st.booleans(),
    act_order=st.booleans(),
)
def test_gptq_is_never_worse_than_rtn_on_any_row(
    fmt: str, seed: int, count: int, rotation: int, clip: bool, act_order: bool
) -> None:
    x, weights, format_ = tokens(count, seed), linears(seed), formats.get(fmt)
    config = SolveSettings(rotation=rotation, clip_search=clip, act_order=act_order)
    solutions = solve(fmt, config, x, weights=weights)
    basis = Basis(rotation)
    transformed = basis.input(x).double()
    for name, w in weights.items():
        target = basis.weight(w)
        rtn = format_.dequantize(format_.quantize(target))
        errors = [
            ((values - target).double() @ transformed.T).square().sum(-1)
            for values in (format_.dequantize(solutions[name].codes), rtn)
        ]
        scale = (target.double() @ transformed.T).square().sum(-1)
        assert (errors[0] <= errors[1] + 1e-6 * scale).all()
        assert solutions[name].stats["trace_error"] == pytest.approx(
            float(errors[0].sum() / scale.sum()), rel=1e-2, abs=1e-6
        )
        assert solutions[name].stats["trace_error"] <= solutions[name].stats["trace_error_rtn"]


def test_rows_where_rtn_was_better_are_kept_and_counted() -> None:
    # Almost uncorrelated inputs: greedy feedback loses on some rows.
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    w = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    fmt = formats.get("mxfp4")
    solution = solve("mxfp4", SolveSettings(), x, weights={"w": w})["w"]
    kept = solution.stats["rows_kept_rtn"]
    assert isinstance(kept, int) and 0 < kept < 200
    same = (solution.codes.elements == fmt.quantize(w).elements).all(-1).sum()
    assert int(same) >= kept


@pytest.mark.parametrize("fmt", ["mxfp4", "hif4"])
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_bias_correction_removes_the_mean_error(fmt: str, rounding: str) -> None:
    x = tokens(400)
    with_it = dataclasses.replace(ALL, rounding=rounding)
    without = dataclasses.replace(with_it, bias_correction=False)
    means = {}
    for config in (with_it, without):
        solutions = solve(fmt, config, x)
        means[config] = torch.cat(
            [
                (module(fmt, config, solutions[name])(x).double() - (x @ w.T).double()).mean(0) - float(name == "q")
                for name, w in linears().items()
            ]
        )
        assert (solutions["k"].bias is None) == (not config.bias_correction)
    assert means[with_it].abs().max() < 1e-4
    assert means[without].abs().max() > 1e-2


@pytest.mark.parametrize("rotation", [0, 64])
def test_rtn_without_statistics_is_the_formats_conversion(rotation: int) -> None:
    fmt, weights = formats.get("hif4"), linears()
    config = SolveSettings(rounding="rtn", rotation=rotation)
    solutions = solve_group(weights, dict.fromkeys(weights), None, fmt, config)
    for name, w in weights.items():
        expected = fmt.quantize(Basis(rotation).weight(w))
        assert torch.equal(solutions[name].codes.elements, expected.elements)
        assert torch.equal(solutions[name].codes.scales, expected.scales)
        assert solutions[name].bias is None and solutions[name].basis.stored is None
        assert "output_error" not in solutions[name].stats


def test_without_a_hessian_the_searches_still_work() -> None:
    x = tokens(300)
    stats = dataclasses.replace(InputStats.from_tokens(x), h_kk=None)
    config = dataclasses.replace(ALL, rounding="rtn")
    weights = linears()
    solved = solve_group(weights, dict.fromkeys(weights), stats, formats.get("hif4"), config)["q"]
    assert solved.stats["basis"] == "0.5"
    assert solved.stats["output_error"] < solved.stats["output_error_rtn"]
    assert "trace_error" not in solved.stats


@pytest.mark.parametrize("fmt", ["mxfp4", "hif4"])
def test_linears_of_a_group_do_not_influence_each_other_without_smoothing(fmt: str) -> None:
    x, weights = tokens(300), linears()
    config = dataclasses.replace(ALL, smoothing=(), float64=True)
    together = solve(fmt, config, x)
    for name, w in weights.items():
        alone = solve(fmt, config, x, weights={name: w})[name]
        assert torch.equal(alone.codes.elements, together[name].codes.elements)
        assert torch.equal(alone.codes.scales, together[name].codes.scales)


@pytest.mark.parametrize("fmt", ["mxfp4", "hif4"])
@pytest.mark.parametrize("config", [ALL, LEARNED])
@pytest.mark.parametrize("case", ["zero weight", "constant input", "zero input", "one token"])
def test_degenerate_layers_have_a_clear_outcome(fmt: str, case: str, config: SolveSettings) -> None:
    x, weights = tokens(100), linears()
    if case == "zero weight":
        weights = {name: torch.zeros_like(w) for name, w in weights.items()}
    elif case == "constant input":
        x = x[:1].expand(100, -1).contiguous()
    elif case == "zero input":
        x = torch.zeros_like(x)
    else:
        x = x[:1]
    solutions = solve(fmt, config, x, weights=weights)
    for name, solution in solutions.items():
        json.dumps(solution.stats, allow_nan=False)
        assert solution.bias is not None and torch.isfinite(solution.bias).all()
        assert torch.isfinite(formats.get(fmt).dequantize(solution.codes)).all()
        y = module(fmt, config, solution)(x) - float(name == "q")
        # The mean error is gone, and with constant inputs there is no other.
        limit = 1e-4 if case != "zero weight" else 0.0
        assert (y - x @ weights[name].T).abs().max() <= limit + 1e-4 * (x @ weights[name].T).abs().max()
    if case == "zero weight":
        assert not any(solution.codes.elements.any() for solution in solutions.values())
    if case == "zero input":
        assert solutions["q"].stats["dead_columns"] == K


def test_damping_retries_are_reported() -> None:
    x = tokens(5)
    stats = InputStats.from_tokens(x)
    h = stats.h_kk - 0.05 * stats.h_kk.diagonal().mean() * torch.eye(K) * (1e-3)
    h.diagonal().clamp_(min=0)
    weights = linears()
    config = SolveSettings(damping=1e-8)
    solution = solve_group(
        weights, dict.fromkeys(weights), dataclasses.replace(stats, h_kk=h), formats.get("mxfp4"), config
    )["q"]
    assert solution.stats["damping_retries"] >= 3
    assert solution.stats["damping"] == pytest.approx(1e-8 * 10 ** solution.stats["damping_retries"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 96}, "q, k, v: K = 96 is not a multiple of 64"),
        ({"rotation": 128, "k": 192}, "K = 192 is not a multiple of 128"),
        ({"stats_k": 64}, "64 channels"),
        ({"h": None}, "needs the input's Hessian"),
        ({"h": torch.nan}, "q, k, v: The Hessian holds NaN"),
        ({"weight": torch.inf}, "q, k, v: The weight .* holds 1 NaN or infinite"),
        ({"h": None, "learned": True}, "learned transform needs the input's Hessian"),
        ({"h": torch.nan, "learned": True}, "q, k, v: The Hessian holds NaN"),
        ({"weight": torch.inf, "learned": True}, "q, k, v: The weight .* holds 1 NaN or infinite"),
    ],
)
def test_unusable_input_names_the_layers(change: dict[str, object], message: str) -> None:
    k = change.get("k", K)
    weights = linears(k=k)
    stats = InputStats.from_tokens(tokens(50, k=change.get("stats_k", k)))
    if "h" in change:
        stats = dataclasses.replace(stats, h_kk=None if change["h"] is None else stats.h_kk * change["h"])
    if "weight" in change:
        weights["k"][3, 3] = change["weight"]
    config = SolveSettings(rotation=change.get("rotation", 0))
    if "learned" in change:
        config = SolveSettings(rounding="rtn", rotation=64, learned_transform=True)
    with pytest.raises(SolverError, match=message):
        solve_group(weights, dict.fromkeys(weights), stats, formats.get("hif4"), config)


def test_statistics_refuse_what_cannot_be_used() -> None:
    x = tokens(10)
    with pytest.raises(SolverError, match="mean_k holds NaN"):
        InputStats.from_tokens(torch.where(torch.arange(10)[:, None] == 3, torch.nan, x))
    with pytest.raises(SolverError, match="at least one token"):
        InputStats.from_tokens(x, torch.zeros(10))
    with pytest.raises(SolverError, match="absmax_k has shape"):
        dataclasses.replace(InputStats.from_tokens(x), absmax_k=torch.ones(3))


def test_statistics_of_weighted_tokens() -> None:
    x, w_t = tokens(50).double(), torch.rand(50, generator=torch.Generator().manual_seed(0))
    stats = InputStats.from_tokens(x, w_t, sample=10, dtype=torch.float64)
    torch.testing.assert_close(stats.h_kk, sum(w * torch.outer(v, v) for w, v in zip(w_t.double(), x, strict=True)))
    torch.testing.assert_close(
        stats.rms_k.double().square(), (w_t.double() @ x.square()) / w_t.double().sum(), rtol=1e-5, atol=0
    )
    assert (len(stats.x_tk), stats.n_tokens) == (10, 50)


def test_trace_errors_equal_errors_over_tokens() -> None:
    e, x = torch.randn(7, 2500, dtype=torch.float64), torch.randn(300, 2500, dtype=torch.float64)
    torch.testing.assert_close(trace_errors(e, x.T @ x), (e @ x.T).square().sum(-1))
