"""What residual blocks are worth, against brute force in float64, and the choice under a budget."""

import pytest
import torch

from ptq.config.recipe import SolverSettings
from ptq.scheme import Scheme
from ptq.solvers import InputStats, SolverError, solve_group
from ptq.solvers.residual import BlockGains, block_gains, choose_blocks


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("scheme", "k"), [(Scheme.of("hif4", input_rule="mse"), 128), (Scheme.of("mxfp4"), 160)])
def test_gains_are_the_error_that_a_residual_takes_away(scheme, k):
    """Half a block of MXFP4 gets none."""
    x = randn(50, k) * torch.linspace(0.1, 3, k)
    xq = scheme.quantize_input(x, None)
    weights = [randn(24, k, seed=1), randn(8, k, seed=2) * 10, torch.zeros(4, k)]
    signals = [float((x @ w.T).square().sum()) for w in weights]
    found = block_gains(x, xq, weights, signals, 36, scheme)
    expected = []
    for block in range(2):
        part = slice(64 * block, 64 * block + 64)
        noise = (x - xq)[:, part].contiguous()
        left = noise - scheme.format.fake_quantize(noise, scale_rule=scheme.input_rule)
        before, after = (
            sum(
                float((one.double() @ w[:, part].double().T).square().sum()) / s
                for w, s in zip(weights[:2], signals[:2], strict=True)
            )
            for one in (noise, left)
        )
        assert after < 0.05 * before
        expected.append(before - after)
    assert found.rows == 36 and found.gains == pytest.approx(expected, rel=1e-4)


def test_the_most_useful_blocks_that_the_budget_pays_for():
    inputs = {
        "narrow": BlockGains((1.0, 5.0, 0.0), rows=10),
        "wide": BlockGains((30.0, 9.0), rows=100),
        "felt": BlockGains((0.5,), rows=10, sensitivity=20.0),
    }
    spent = lambda chosen: sum(64 * inputs[name].rows * len(blocks) for name, blocks in chosen.items())  # noqa: E731
    assert choose_blocks(inputs, 64 * 20) == {"narrow": (1,), "wide": (), "felt": (0,)}
    assert choose_blocks(inputs, 64 * 119) == {"narrow": (0, 1), "wide": (), "felt": (0,)}
    assert choose_blocks(inputs, 64 * 120) == {"narrow": (1,), "wide": (0,), "felt": (0,)}
    assert choose_blocks(inputs, 1e9) == {
        "narrow": (0, 1),
        "wide": (0, 1),
        "felt": (0,),
    }  # a block without gain is free to stay
    assert choose_blocks(inputs, 0) == {"narrow": (), "wide": (), "felt": ()}
    for budget in range(0, 64 * 250, 640):
        assert spent(choose_blocks(inputs, budget)) <= budget


def test_codes_are_those_without_and_records_are_needed():
    weights, scheme = {"a": randn(16, 128, seed=1), "b": randn(16, 128, seed=2)}, Scheme.of("hif4")
    stats = InputStats.from_tokens(randn(64, 128))
    settings = SolverSettings(rounding="gptq", clip_search=True)
    plain = solve_group(weights, stats, scheme, settings)
    found = solve_group(weights, stats, scheme, settings.model_copy(update={"residual": 0.1}))
    assert all(torch.equal(found[name].codes.elements, plain[name].codes.elements) for name in weights)
    assert plain["a"].gains is None and found["a"].gains == found["b"].gains and len(found["a"].gains.gains) == 2
    with pytest.raises(SolverError, match=r"set solver.residual to 0"):
        solve_group(weights, None, scheme, SolverSettings(residual=0.1))
