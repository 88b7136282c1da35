"""The composition: every ingredient on a group of Linears that share one input."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq import formats
from ptq.config.recipe import SolverSettings
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme
from ptq.solvers import InputStats, LayerSolution, SolverError, factorize, solve_group
from ptq.solvers.measure import trace_errors

K = 128
RTN, GPTQ = SolverSettings(rounding="rtn"), SolverSettings(rounding="gptq")
CLIPPED = SolverSettings(rounding="gptq", clip_search=True)
SMOOTHING = SolverSettings(rounding="gptq", clip_search=True, smoothing=(0.5,))
NONE = ("none", 0)
ALL = ("smoothed", 32), SMOOTHING
LEARNED = ("learned", 64), CLIPPED
Transform = tuple[str, int]
"""Kind and block."""
Config = tuple[Transform, SolverSettings]


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


def scheme_of(fmt: str, transform: Transform) -> Scheme:
    kind, block = transform
    return Scheme.of(fmt, transform=kind, block=block)


def solve(
    fmt: str, config: Config, x: Tensor, sample: int | None = None, weights: dict[str, Tensor] | None = None
) -> dict[str, LayerSolution]:
    transform, settings = config
    stats = InputStats.from_tokens(x, sample=sample)
    return solve_group(linears() if weights is None else weights, stats, scheme_of(fmt, transform), settings)


def module(fmt: str, config: Config, name: str, solution: LayerSolution) -> QuantLinear:
    """The layer as it runs; q has a bias."""
    bias = torch.ones(len(solution.codes.elements)) if name == "q" else None
    return QuantLinear.from_codes(solution.codes, scheme_of(fmt, config[0]), bias, solution.basis)


def held_out_error(fmt: str, config: Config, solutions: dict[str, LayerSolution], x: Tensor) -> float:
    error = signal = 0.0
    for name, w in linears().items():
        y = x @ w.T + (1.0 if name == "q" else 0.0)
        error += float((module(fmt, config, name, solutions[name])(x) - y).square().sum())
        signal += float((x @ w.T).square().sum())
    return error / signal


@pytest.mark.parametrize("fmt", ["mxfp4", "hif4"])
def test_gptq_rotation_and_smoothing_help_on_held_out_tokens_and_the_rest_does_no_harm(fmt: str) -> None:
    x, held_out = tokens(2048), tokens(512, seed=1)
    ladder = [
        (NONE, RTN),
        (NONE, GPTQ),
        (("hadamard", 32), GPTQ),
        (("smoothed", 32), SolverSettings(rounding="gptq", smoothing=(0.5,))),
        ALL,
        LEARNED,
    ]
    errors = [held_out_error(fmt, config, solve(fmt, config, x, sample=256), held_out) for config in ladder]
    assert errors[:4] == sorted(errors[:4], reverse=True)
    assert errors[4] < 1.01 * errors[3] < 0.4 * errors[0]
    assert errors[5] < 0.9 * errors[4]


@pytest.mark.parametrize("fmt", ["mxfp4", "hif4"])
@pytest.mark.parametrize("config", [ALL, LEARNED, (NONE, RTN), (NONE, CLIPPED), (("hadamard", 16), GPTQ)])
def test_reported_output_error_is_that_of_the_module(fmt: str, config: Config) -> None:
    x = tokens(300)
    solutions = solve(fmt, config, x)
    for name, w in linears().items():
        bias = 1.0 if name == "q" else 0.0
        y = module(fmt, config, name, solutions[name])(x) - bias
        expected = (y - x @ w.T).square().sum() / (x @ w.T).square().sum()
        assert solutions[name].stats["output_error"] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(("fmt", "rule"), [("mxfp4", "mse"), ("mxfp4", "ceil"), ("hif4", "mse")])
def test_inputs_are_quantized_by_the_rule_of_the_scheme(fmt: str, rule: str) -> None:
    x, weights = tokens(300), linears()
    scheme, by_default = (Scheme.of(fmt, transform="hadamard", block=64, input_rule=r) for r in (rule, None))
    found, other = (solve_group(weights, InputStats.from_tokens(x), s, GPTQ)["v"] for s in (scheme, by_default))
    assert torch.equal(found.codes.elements, other.codes.elements) and torch.equal(
        found.codes.scales, other.codes.scales
    )
    assert found.stats["output_error"] != other.stats["output_error"]
    y = QuantLinear.from_codes(found.codes, scheme, None, found.basis)(x)
    target = x @ weights["v"].T
    expected = (y - target).square().sum() / target.square().sum()
    assert found.stats["output_error"] == pytest.approx(float(expected), rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    fmt=st.sampled_from(["mxfp4", "hif4"]),
    seed=st.integers(0, 10**6),
    count=st.sampled_from([3, 60, 500]),
    block=st.sampled_from([0, 16, 128]),
    clip=st.booleans(),
    act_order=st.booleans(),
)
def test_gptq_is_never_worse_than_rtn_on_any_row(
    fmt: str, seed: int, count: int, block: int, clip: bool, act_order: bool
) -> None:
    x, weights, format_ = tokens(count, seed), linears(seed), formats.get(fmt)
    scheme = scheme_of(fmt, ("hadamard", block) if block else NONE)
    config = SolverSettings(rounding="gptq", clip_search=clip, act_order=act_order)
    solutions = solve_group(weights, InputStats.from_tokens(x), scheme, config)
    transformed = scheme.transform.input(x, None).double()
    for name, w in weights.items():
        target = scheme.transform.weight(w, None)
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
    solution = solve("mxfp4", (NONE, GPTQ), x, weights={"w": w})["w"]
    kept = solution.stats["rows_kept_rtn"]
    assert isinstance(kept, int) and 0 < kept < 200
    same = (solution.codes.elements == fmt.quantize(w).elements).all(-1).sum()
    assert int(same) >= kept


@pytest.mark.parametrize("transform", [NONE, ("hadamard", 64)])
@pytest.mark.parametrize("weight_rule", [None, "mse"])
def test_rtn_without_statistics_is_the_formats_conversion(transform: Transform, weight_rule: str | None) -> None:
    scheme, weights = scheme_of("hif4", transform), linears()
    solutions = solve_group(weights, None, scheme, SolverSettings(rounding="rtn", weight_rule=weight_rule))
    for name, w in weights.items():
        expected = scheme.format.quantize(scheme.transform.weight(w, None), scale_rule=weight_rule)
        assert torch.equal(solutions[name].codes.elements, expected.elements)
        assert torch.equal(solutions[name].codes.scales, expected.scales)
        assert solutions[name].basis is None and solutions[name].stats["basis"] == "off"
        assert "output_error" not in solutions[name].stats


def test_without_a_hessian_the_searches_still_work() -> None:
    x = tokens(300)
    stats = dataclasses.replace(InputStats.from_tokens(x), h_kk=None)
    config = SMOOTHING.model_copy(update={"rounding": "rtn"})
    solved = solve_group(linears(), stats, scheme_of("hif4", ALL[0]), config)["q"]
    assert solved.stats["basis"] == "0.5"
    assert solved.stats["output_error"] < solved.stats["output_error_rtn"]
    assert "trace_error" not in solved.stats


@pytest.mark.parametrize("fmt", ["mxfp4", "hif4"])
def test_linears_of_a_group_do_not_influence_each_other_without_smoothing(
    fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64 the order of sums, which depends on the height of the stack, does not reach the codes.
    monkeypatch.setattr("ptq.solvers.solve.factorize", functools.partial(factorize, dtype=torch.float64))
    x, weights = tokens(300), linears()
    config = (("hadamard", 32), CLIPPED)
    together = solve(fmt, config, x)
    for name, w in weights.items():
        alone = solve(fmt, config, x, weights={name: w})[name]
        assert torch.equal(alone.codes.elements, together[name].codes.elements)
        assert torch.equal(alone.codes.scales, together[name].codes.scales)


@pytest.mark.parametrize("fmt", ["mxfp4", "hif4"])
@pytest.mark.parametrize("config", [ALL, LEARNED])
@pytest.mark.parametrize("case", ["zero weight", "constant input", "zero input", "one token"])
def test_degenerate_layers_have_a_clear_outcome(fmt: str, case: str, config: Config) -> None:
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
        assert torch.isfinite(formats.get(fmt).dequantize(solution.codes)).all()
        assert solution.basis is not None
        stored = scheme_of(fmt, config[0]).transform.stored(K)
        assert (tuple(solution.basis.shape), solution.basis.dtype) == stored
        y, target = module(fmt, config, name, solution)(x) - float(name == "q"), x @ weights[name].T
        if case in ("zero weight", "zero input"):
            assert not y.any() and not target.any()
            continue
        # Along the only direction that tokens have, feedback leaves next to nothing: the rest is the inputs' own error.
        stats = solution.stats
        assert stats["trace_error"] < 1e-5 and stats["trace_error"] < 0.05 * stats["trace_error_rtn"]
        assert stats["output_error"] < 0.8 * stats["output_error_rtn"]
        found = (y - target).square().sum() / target.square().sum()
        assert float(found) == pytest.approx(stats["output_error"], rel=1e-3)
    if case == "zero weight":
        assert not any(solution.codes.elements.any() for solution in solutions.values())
    if case == "zero input":
        assert solutions["q"].stats["dead_columns"] == K


def test_damping_retries_are_reported() -> None:
    x = tokens(5)
    stats = InputStats.from_tokens(x)
    h = stats.h_kk - 0.05 * stats.h_kk.diagonal().mean() * torch.eye(K) * (1e-3)
    h.diagonal().clamp_(min=0)
    config = SolverSettings(rounding="gptq", damping=1e-8)
    solution = solve_group(linears(), dataclasses.replace(stats, h_kk=h), scheme_of("mxfp4", NONE), config)["q"]
    assert solution.stats["damping_retries"] >= 3
    assert solution.stats["damping"] == pytest.approx(1e-8 * 10 ** solution.stats["damping_retries"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 96}, "q, k, v: K = 96 is not a multiple of 64"),
        ({"stats_k": 64}, "64 channels"),
        ({"h": None}, "needs the input's Hessian"),
        ({"h": torch.nan}, "q, k, v: The Hessian holds NaN"),
        ({"weight": torch.inf}, "q, k, v: The weight .* holds 1 NaN or infinite"),
        ({"h": None, "transform": ("learned", 64)}, "learned transform needs the input's Hessian"),
        ({"h": torch.nan, "transform": ("learned", 64)}, "q, k, v: The Hessian holds NaN"),
        ({"weight": torch.inf, "transform": ("learned", 64)}, "q, k, v: The weight .* holds 1 NaN or infinite"),
        ({"stats": None}, "q, k, v: GPTQ needs the input's Hessian"),
        ({"stats": None, "transform": ("learned", 64)}, "q, k, v: A learned transform needs calibration statistics"),
        ({"stats": None, "transform": ("smoothed", 64)}, "q, k, v: A smoothed transform needs calibration statistics"),
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
    transform = change.get("transform", NONE)
    config = RTN if transform[0] in ("learned", "smoothed") else GPTQ
    with pytest.raises(SolverError, match=message):
        solve_group(weights, stats if "stats" not in change else None, scheme_of("hif4", transform), config)


def test_statistics_refuse_what_cannot_be_used() -> None:
    x = tokens(10)
    stats = InputStats.from_tokens(x)
    with pytest.raises(SolverError, match="absmax_k holds NaN"):
        InputStats.from_tokens(torch.where(torch.arange(10)[:, None] == 3, torch.nan, x))
    with pytest.raises(SolverError, match="x_tk holds NaN or infinity"):
        dataclasses.replace(stats, x_tk=x / 0)
    with pytest.raises(SolverError, match="hold 0 tokens and 10 sample tokens; at least one of each"):
        dataclasses.replace(stats, n_tokens=0)
    with pytest.raises(SolverError, match="hold 10 tokens and 0 sample tokens"):
        dataclasses.replace(stats, x_tk=x[:0])
    with pytest.raises(SolverError, match=rf"h_kk has shape \({K}, {K}\), expected \(3, 3\)"):
        dataclasses.replace(stats, absmax_k=torch.ones(3))
    with pytest.raises(SolverError, match=rf"x_tk has shape \(10, 64\), expected \(10, {K}\)"):
        dataclasses.replace(stats, x_tk=x[:, :64])


def test_statistics_of_tokens() -> None:
    x = tokens(50).double()
    stats = InputStats.from_tokens(x, sample=10, dtype=torch.float64)
    torch.testing.assert_close(stats.h_kk, sum(torch.outer(v, v) for v in x))
    torch.testing.assert_close(stats.rms_k.double().square(), x.square().mean(0), rtol=1e-5, atol=0)
    assert torch.equal(stats.absmax_k, x.abs().amax(0).float()) and stats.k == K
    assert (len(stats.x_tk), stats.n_tokens, stats.total_tokens) == (10, 50, 50)
    assert all((x.float() == row).all(-1).any() for row in stats.x_tk)
    assert torch.equal(stats.x_tk[[0, -1]], x[[0, -1]].float())
    assert InputStats.from_tokens(x, sample=1000).x_tk.shape == (50, K)


def test_root_mean_squares_count_the_tokens_that_the_hessian_stands_for() -> None:
    """A Hessian of some tokens is weighted up to stand for all; without one the sample speaks."""
    x = tokens(50)
    stats = InputStats.from_tokens(x)
    assert stats.h_kk is not None
    more = dataclasses.replace(stats, h_kk=3 * stats.h_kk, total_tokens=150)
    torch.testing.assert_close(more.rms_k, stats.rms_k)
    without = dataclasses.replace(stats, h_kk=None, x_tk=x[:20])
    torch.testing.assert_close(without.rms_k, x[:20].square().mean(0).sqrt(), rtol=1e-5, atol=0)


def test_trace_errors_equal_errors_over_tokens() -> None:
    e, x = torch.randn(7, 2500, dtype=torch.float64), torch.randn(300, 2500, dtype=torch.float64)
    torch.testing.assert_close(trace_errors(e, x.T @ x), (e @ x.T).square().sum(-1))
