"""How many torch operations a block's solve dispatches: on a GPU each is a launch, and launches were what bound it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptq.config import load_recipe
from ptq.scheme import Codes, Format, Scheme, hif4_search
from ptq.solvers import InputStats, solve_group
from ptq.solvers.conversion import Definition

READERS = {"qkv": 3, "out": 1, "q2": 1, "kv2": 3, "out2": 1, "up": 1}
"""Input of an A14B block of K = 5120 -> how many Linears read it (kv2: two, counted as three)."""
K, DOWN, SMALLER = 5120, 13824, 3456
"""The true widths; the second is counted at a quarter, and with what a column block of 128 adds between there and the first."""
ROWS = 16
"""Of each Linear: rows are what a GPU does side by side, so they do not count."""
LIMIT = 5000


VIEWS = (
    "slice",
    "detach",
    "view",
    "permute",
    "expand",
    "transpose",
    "select",
    "unsqueeze",
    "squeeze",
    "split",
    "alias",
    "t.",
    "unbind",
    "diagonal",
    "empty",
    "lift_fresh",
    "_unsafe_view",
    "as_strided",
)
"""Operations that compute nothing."""


class Operations(TorchDispatchMode):
    """Counts the operations that compute, all of them, and those that wait for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        view = function.__name__.split(".")[0] + "."
        self.count += not view.startswith(VIEWS)
        self.waits += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def statistics(k: int) -> InputStats:
    """A well-conditioned Hessian that costs nothing to make: a diagonal and a few directions."""
    generator = torch.Generator().manual_seed(k)
    x: Tensor = torch.randn(32, k, generator=generator)
    h_kk = x.T @ x
    h_kk.diagonal().add_(32.0)
    return InputStats(h_kk, x.abs().amax(0), 64, 64, x)


class Launched(Definition):
    """Conversions as `ptq.runtime.conversion` makes them on a GPU: one launch each, and what is done with its output."""

    def __init__(self) -> None:
        self.launches = 0

    def input(self, x_tk: Tensor, basis: Tensor | None, scheme: Scheme) -> Tensor:
        self.launches += 1
        return super().input(x_tk, basis, scheme).bfloat16().float()

    def weight(self, w_nk: Tensor, fmt: Format, scale_rule: str | None) -> Codes:
        self.launches += 1
        return fmt.unpack(*fmt.quantize_and_pack(w_nk, scale_rule=scale_rule))


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["hif4"])
def test_a_block_of_true_width_takes_few_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU: decoding and the search of scales by tensor operations, conversions by kernels.
    monkeypatch.setattr(Format, "_decoding", lambda *_: None)
    monkeypatch.setattr(hif4_search, "searched_natively", hif4_search.searched)
    recipe = load_recipe(name, name)
    scheme = Scheme.of(name, **recipe.scheme.model_dump())

    def solved(k: int, linears: int) -> Operations:
        weights = {str(i): torch.randn(ROWS, k, generator=torch.Generator().manual_seed(i)) for i in range(linears)}
        stats, launched = statistics(k), Launched()
        with Operations() as operations:
            solve_group(weights, stats, scheme, recipe.solver, launched)
        operations.count += launched.launches
        return operations

    solved(256, 1)  # what is made once a process
    counted, smaller = {linears: solved(K, linears) for linears in (1, 3)}, solved(SMALLER, 1)
    added = (counted[1].count - smaller.count) / (K - SMALLER)
    assert added < 4 / 128, "a column block of 128 adds a few operations"
    total = sum(counted[linears].count for linears in READERS.values()) + smaller.count + added * (DOWN - SMALLER)
    waits = sum(counted[linears].waits for linears in READERS.values()) + smaller.waits
    print(f"{name}: {total:.0f} operations, {waits} of them wait for a result")
    assert total < LIMIT
    assert waits < 40 * (len(READERS) + 1)
