"""Smoothing factors, and the search for a basis with exponents as candidates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.config.recipe import SolverSettings
from ptq.scheme import Scheme
from ptq.scheme.smoothing import LIMIT, column_size, smoothing_factors
from ptq.solvers import InputStats, SolverError, search_basis

sizes = st.lists(st.floats(0, 2.0**100, width=32), min_size=8, max_size=8)


@settings(max_examples=100, deadline=None)
@given(sizes, sizes, st.floats(0, 1))
def test_factors_are_positive_finite_bfloat16(x: list[float], w: list[float], alpha: float) -> None:
    factors = smoothing_factors(torch.tensor(x), torch.tensor(w), alpha)
    assert factors.dtype == torch.bfloat16
    assert torch.isfinite(factors).all()
    assert ((factors >= 1 / LIMIT) & (factors <= LIMIT)).all()


def test_half_balances_energy_of_input_and_weight() -> None:
    x, w = torch.tensor([1.0, 100.0, 4.0, 0.0]), torch.tensor([1.0, 1.0, 9.0, 5.0])
    s = smoothing_factors(x, w, 0.5).float()
    ratio = (s * x / (w / s))[:3]
    torch.testing.assert_close(ratio, ratio[:1].expand(3), rtol=0.02, atol=0)
    assert s[3] == 1, "an empty channel keeps its weight"


def test_column_size_gives_every_linear_the_same_say() -> None:
    small = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert torch.allclose(column_size([small * 1e6, small]), column_size([small, small]))


def outliers(tokens: int, k: int, factor: float) -> Tensor:
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(0))
    x[:, ::40] *= factor
    return x


@pytest.mark.parametrize(("name", "block"), [("mxfp4", 32), ("hif4", 32), ("hif4", 0)])
def test_persistent_outliers_are_smoothed_away(name: str, block: int) -> None:
    x = outliers(256, 128, 60.0)
    weights = [torch.randn(n, 128, generator=torch.Generator().manual_seed(n)) for n in (48, 32)]
    stats = InputStats.from_tokens(x)
    scheme = Scheme.of(name, transform="smoothed", block=block)
    result = search_basis(weights, stats, scheme, SolverSettings(smoothing=(0.4, 0.5, 0.6)))
    assert result.name in ("0.4", "0.5", "0.6")
    assert set(result.errors) == {"off", "0.4", "0.5", "0.6"}
    assert result.errors[result.name] == min(result.errors.values()) < 0.7 * result.errors["off"]
    basis, transform = result.basis, scheme.transform
    assert basis is not None and (tuple(basis.shape), basis.dtype) == ((128,), torch.bfloat16)
    for w in weights:
        torch.testing.assert_close(
            transform.input(x, basis) @ transform.weight(w, basis).T, x @ w.T, rtol=1e-4, atol=1e-2
        )
    h = x.double().T @ x.double()
    transformed = transform.input(x, basis).double()
    torch.testing.assert_close(transform.hessian(h, basis), transformed.T @ transformed, rtol=1e-4, atol=1e-3)


def test_off_wins_where_smoothing_only_hurts() -> None:
    # Input and weight already fit the grid; any smoothing takes them off it.
    levels = torch.tensor([0.5, 1.0, 2.0, 6.0])
    generator = torch.Generator().manual_seed(0)
    x = levels[torch.randint(0, 4, (64, 64), generator=generator)]
    x[:, 0], x[:, 32] = 6.0, 6.0
    w = levels[torch.randint(0, 4, (16, 64), generator=generator)]
    w[:, 0], w[:, 32] = 6.0, 6.0
    scheme = Scheme.of("mxfp4", transform="smoothed")
    result = search_basis([w], InputStats.from_tokens(x), scheme, SolverSettings(smoothing=(0.3, 0.5)))
    assert (result.name, result.errors["off"]) == ("off", 0.0) and set(result.errors) == {"off", "0.3", "0.5"}
    assert result.basis is not None and result.basis.eq(1).all()


@pytest.mark.parametrize("kind", ["none", "hadamard", "smoothed"])
def test_nothing_is_searched_where_there_is_nothing_to_choose(kind: str) -> None:
    """Exponents are tried by the transforms that can smooth, and only where some are given."""
    x, w = outliers(64, 64, 10.0), torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    scheme = Scheme.of("hif4", transform=kind, block=32)
    exponents = () if kind == "smoothed" else (0.5,)
    result = search_basis([w], InputStats.from_tokens(x), scheme, SolverSettings(smoothing=exponents))
    assert (result.name, result.errors) == ("off", {})
    plain = scheme.transform.plain(64)
    assert (result.basis is None) == (plain is None)
    if plain is not None:
        assert result.basis is not None and torch.equal(result.basis, plain)


def test_candidates_are_quantized_by_the_rules_of_scheme_and_solver() -> None:
    x, w = outliers(64, 64, 10.0), torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    stats = InputStats.from_tokens(x)

    def off(input_rule: str, weight_rule: str) -> float:
        scheme = Scheme.of("mxfp4", transform="smoothed", block=32, input_rule=input_rule)
        return search_basis([w], stats, scheme, SolverSettings(smoothing=(0.5,), weight_rule=weight_rule)).errors["off"]

    rules = ("floor", "ceil", "mse")
    errors = {(i, j): off(i, j) for i in rules for j in rules}
    assert len(set(errors.values())) == len(errors)
    for (input_rule, weight_rule), found in errors.items():
        scheme = Scheme.of("mxfp4", transform="hadamard", block=32, input_rule=input_rule)
        wq = scheme.format.fake_quantize(scheme.transform.weight(w, None), scale_rule=weight_rule)
        y = x @ w.T
        expected = (scheme.quantize_input(x, None) @ wq.T - y).square().sum() / y.square().sum()
        assert found == pytest.approx(float(expected), rel=1e-4)


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    w = torch.ones(4, 64)
    w[2, 3] = torch.inf
    scheme, tried = Scheme.of("hif4", transform="smoothed", block=32), SolverSettings(smoothing=(0.5,))
    with pytest.raises(SolverError, match="1 NaN or infinite"):
        search_basis([torch.ones(4, 64), w], InputStats.from_tokens(outliers(64, 64, 10.0)), scheme, tried)
