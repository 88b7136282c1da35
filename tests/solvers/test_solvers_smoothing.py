"""Smoothing factors, and the search for a basis with exponents as candidates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq import formats
from ptq.solvers import InputStats, search_basis, smoothing_factors
from ptq.solvers.smoothing import LIMIT, column_size

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


@pytest.mark.parametrize(("name", "rotation"), [("mxfp4", 32), ("hif4", 32), ("hif4", 0)])
def test_persistent_outliers_are_smoothed_away(name: str, rotation: int) -> None:
    x = outliers(256, 128, 60.0)
    weights = [torch.randn(n, 128, generator=torch.Generator().manual_seed(n)) for n in (48, 32)]
    stats = InputStats.from_tokens(x)
    result = search_basis(weights, stats, formats.get(name), rotation=rotation, alphas=(0.4, 0.5, 0.6))
    assert result.name in ("0.4", "0.5", "0.6")
    assert set(result.errors) == {"off", "0.4", "0.5", "0.6"}
    assert result.errors[result.name] == min(result.errors.values()) < 0.7 * result.errors["off"]
    basis = result.basis
    assert basis.smooth_k is not None and basis.rotation == rotation
    for w in weights:
        torch.testing.assert_close(basis.input(x) @ basis.weight(w).T, x @ w.T, rtol=1e-4, atol=1e-2)
    h = x.double().T @ x.double()
    transformed = basis.input(x).double()
    torch.testing.assert_close(basis.hessian(h), transformed.T @ transformed, rtol=1e-4, atol=1e-3)


def test_off_wins_where_smoothing_only_hurts() -> None:
    # Input and weight already fit the grid; any smoothing takes them off it.
    levels = torch.tensor([0.5, 1.0, 2.0, 6.0])
    generator = torch.Generator().manual_seed(0)
    x = levels[torch.randint(0, 4, (64, 64), generator=generator)]
    x[:, 0], x[:, 32] = 6.0, 6.0
    w = levels[torch.randint(0, 4, (16, 64), generator=generator)]
    w[:, 0], w[:, 32] = 6.0, 6.0
    result = search_basis([w], InputStats.from_tokens(x), formats.get("mxfp4"), rotation=0, alphas=(0.3, 0.5))
    assert (result.name, result.basis.smooth_k, result.errors["off"]) == ("off", None, 0.0)


def test_token_weights_count() -> None:
    x = torch.cat((outliers(64, 64, 100.0), outliers(64, 64, 1.0)))
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    first = torch.tensor([1.0] * 64 + [0.0] * 64)

    def errors(w_t: Tensor, tokens: Tensor) -> dict[str, float]:
        stats = dataclasses.replace(InputStats.from_tokens(x), x_tk=tokens, w_t=w_t)
        return search_basis([w], stats, formats.get("hif4"), rotation=0, alphas=(0.5,)).errors

    assert errors(first, x) == pytest.approx(errors(torch.ones(64), x[:64]), rel=1e-5)
    assert errors(first, x) != pytest.approx(errors(torch.ones(128), x), rel=1e-3)
