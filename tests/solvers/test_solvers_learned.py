"""The learned block transform: it keeps the function, and it is the optimum that its module claims."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.config.recipe import SolverSettings
from ptq.scheme import Learned, Scheme, Smoothed, Transform
from ptq.scheme.learned import decode_blocks, encode_blocks, learn_blocks
from ptq.scheme.smoothing import column_size, smoothing_factors
from ptq.solvers import InputStats, search_basis

K, SIZE = 128, 64
LEARNED, SMOOTHED = Learned(SIZE), Smoothed(SIZE)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, seed: int = 0, k: int = K) -> Tensor:
    """Tokens with a few strong directions, and channels of very different sizes."""
    mixing = randn(k, k, seed=100) * torch.logspace(0.5, -1, k)
    return randn(tokens, k, seed=seed) @ mixing.T * torch.exp(randn(k, seed=101))


WEIGHTS = [randn(48, K, seed=1) @ randn(K, K, seed=2) / 8, randn(32, K, seed=3)]


def cost(transform: Transform, basis: Tensor, h_kk: Tensor, weights: list[Tensor]) -> Tensor:
    """What quantization noise costs under the model: (energy of x') (energy of W') of each block, float64 [K / SIZE]."""
    energy = transform.hessian(h_kk.double(), basis).diagonal()
    columns = sum(transform.weight(w, basis).double().square().sum(0) / w.double().square().sum() for w in weights)
    return energy.reshape(-1, SIZE).sum(-1) * columns.reshape(-1, SIZE).sum(-1)


def learned(x: Tensor, weights: list[Tensor]) -> Tensor:
    return learn_blocks(x.double().T @ x.double(), weights, SIZE)


def test_the_function_is_kept_and_the_hessian_follows() -> None:
    x = correlated(400)
    basis = learned(x, WEIGHTS)
    assert basis.dtype == torch.uint8 and basis.shape == (2, SIZE, SIZE)
    for w in WEIGHTS:
        product = LEARNED.input(x, basis) @ LEARNED.weight(w, basis).T
        torch.testing.assert_close(product, x @ w.T, rtol=1e-3, atol=1e-4 * float((x @ w.T).abs().max()))
    changed = LEARNED.input(x, basis).double()
    expected = changed.T @ changed
    torch.testing.assert_close(
        LEARNED.hessian(x.double().T @ x.double(), basis), expected, rtol=1e-4, atol=1e-4 * float(expected.max())
    )


def test_it_reaches_the_bound_and_no_neighbour_is_better() -> None:
    x = correlated(4000)
    h = x.double().T @ x.double()
    basis = learned(x, WEIGHTS)
    found = cost(LEARNED, basis, h, WEIGHTS)
    gram = sum(w.double().T @ w.double() / w.double().square().sum() for w in WEIGHTS)
    for block in range(K // SIZE):
        part = slice(block * SIZE, (block + 1) * SIZE)
        # Singular values by another route: X = Cx Cx^t, G = Cg Cg^t, eigenvalues of X^1/2 G X^1/2 = squares of svd(Cx^t Cg).
        values = torch.linalg.svdvals(torch.linalg.cholesky(h[part, part]).T @ torch.linalg.cholesky(gram[part, part]))
        assert 1.0 <= found[block] / values.sum() ** 2 < 1.1  # shrinkage and three mantissa bits
    blocks = decode_blocks(basis)
    for seed in range(5):
        noise = 1 + 0.3 * randn(*blocks.shape, seed=seed)
        assert (cost(LEARNED, encode_blocks(blocks * noise), h, WEIGHTS) > found).all()


def test_against_smoothing_and_rotation() -> None:
    """Better where channels are correlated, the same where they are not."""
    x = correlated(4000)
    sizes = x.square().mean(0).sqrt(), column_size(WEIGHTS)
    smooth = smoothing_factors(*sizes, 0.5)
    h = x.double().T @ x.double()
    assert (cost(LEARNED, learned(x, WEIGHTS), h, WEIGHTS) < 0.7 * cost(SMOOTHED, smooth, h, WEIGHTS)).all()
    h = torch.diag(h.diagonal())
    weights = [torch.diag(torch.exp(randn(K, seed=7)))]
    smooth = smoothing_factors(h.diagonal().sqrt(), column_size(weights), 0.5)
    plain = learn_blocks(h, weights, SIZE)
    torch.testing.assert_close(cost(LEARNED, plain, h, weights), cost(SMOOTHED, smooth, h, weights), rtol=0.02, atol=0)


def test_every_element_of_a_group_has_the_same_energy() -> None:
    x = correlated(4000)
    energy = LEARNED.hessian(x.double().T @ x.double(), learned(x, WEIGHTS)).diagonal().reshape(-1, SIZE)
    assert (energy.amax(-1) < 2.0 * energy.amin(-1)).all()
    raw = x.double().square().sum(0).reshape(-1, SIZE)
    assert (raw.amax(-1) > 20 * raw.amin(-1)).all()


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_the_search_takes_it_where_it_is_better(name: str) -> None:
    stats = InputStats.from_tokens(correlated(1000))
    tried = SolverSettings(smoothing=(0.5,))
    choice = search_basis(WEIGHTS, stats, Scheme.of(name, transform="learned", block=SIZE), tried)
    assert set(choice.errors) == {"off", "0.5", "learned"}
    assert choice.name == "learned" and choice.errors["learned"] < 0.9 * choice.errors["0.5"]
    assert choice.basis is not None and torch.equal(choice.basis, learn_blocks(stats.h_kk, WEIGHTS, SIZE))
    without = search_basis(WEIGHTS, stats, Scheme.of(name, transform="smoothed", block=SIZE), tried)
    assert without.errors["0.5"] == pytest.approx(choice.errors["0.5"], rel=0.1)  # as blocks: factors of three bits
    assert without.basis is not None and without.basis.dtype == torch.bfloat16 and without.basis.shape == (K,)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(0, 1000), st.sampled_from(["plain", "dead", "outlier", "constant", "no weight"]))
def test_any_input_gives_an_invertible_transform(tokens: int, seed: int, case: str) -> None:
    x, weights = correlated(tokens, seed), [w.clone() for w in WEIGHTS]
    if case == "dead":
        x[:, 5:40] = 0.0
    elif case == "outlier":
        x[:, 3] *= 1000.0
    elif case == "constant":
        x = x[:1].expand(tokens, -1)
    elif case == "no weight":
        weights = [torch.zeros_like(w) for w in weights]
    basis = learned(x, weights)
    for w in WEIGHTS:
        y = x.double() @ w.double().T
        product = LEARNED.input(x, basis).double() @ LEARNED.weight(w, basis).double().T
        size = x.double().norm(dim=-1, keepdim=True) * w.double().norm(dim=-1)
        assert ((product - y).abs() <= 1e-3 * size + 1e-9).all()


@given(st.integers(0, 10**6), st.floats(2.0**-60, 2.0**60))
def test_stored_blocks_are_a_fixed_point_of_any_scale(seed: int, scale: float) -> None:
    stored = encode_blocks(randn(2, 32, 32, seed=seed) * scale)
    decoded = decode_blocks(stored)
    assert torch.equal(encode_blocks(decoded), stored)
    assert torch.equal(decoded.amax((-2, -1)).maximum(-decoded.amin((-2, -1))), torch.ones(2))
    assert torch.equal(decode_blocks(stored, torch.bfloat16).float(), decoded)
