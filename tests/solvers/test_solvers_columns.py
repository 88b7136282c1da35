"""The compiled walk over GPTQ's columns gives the codes and errors of the eager one; where it cannot, it is not used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq import formats
from ptq.scheme.mxfp4 import MXFP4
from ptq.scheme.tensors import with_sign
from ptq.solvers import factorize, gptq, native_columns, round_to_nearest
from ptq.solvers.gptq import round_block
from ptq.solvers.grid import grid_of

FORMATS = ("mxfp4", "hif4")


class Lopsided(MXFP4):
    """Nearest levels, but negative values keep one bit less: no grid of magnitudes says that."""

    name = "lopsided"

    def encode(self, x: Tensor, steps: Tensor) -> Tensor:
        elements = super().encode(x, steps)
        return torch.where(x < 0, elements & 0xE, elements)


class Coarse(MXFP4):
    """Of the eight magnitudes only the lower four are used."""

    name = "coarse"

    def encode(self, x: Tensor, steps: Tensor) -> Tensor:
        return with_sign((super().encode(x, steps) & 7).clamp(max=3), x)


def problem(columns: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns + n)
    weight = torch.randn(columns, n, generator=generator, dtype=dtype)
    target = weight + 0.1 * torch.randn(columns, n, generator=generator, dtype=dtype)
    steps = 0.05 + 0.4 * torch.rand(columns, n, generator=generator)
    target[0, :3] = torch.tensor([0.0, 1e30, -1e30][:n])
    feedback = torch.randn(columns, columns, generator=generator, dtype=dtype).tril(-1) * 0.05
    return target, weight, steps, feedback


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("columns", "n"), [(128, 300), (1, 1), (7, 64), (130, 65)])
def test_the_compiled_walk_equals_the_eager_one_bit_for_bit(
    name: str, dtype: torch.dtype, columns: int, n: int
) -> None:
    fmt = formats.get(name)
    grid = grid_of(fmt)
    assert grid is not None
    tensors = problem(columns, n, dtype)
    eager, compiled = ([tensor.clone() for tensor in tensors] for _ in range(2))
    expected, found = round_block(*eager, fmt), native_columns.round_block(*compiled, grid)
    assert torch.equal(found, expected)
    assert torch.equal(compiled[1], eager[1]), "the errors"
    assert torch.equal(compiled[2], eager[2]), "what was rounded away"
    if columns > 1:
        assert len(expected.unique()) == 15, "every element but -0"


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_shared_out_over_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = formats.get(name)
    tensors = problem(16, 700, torch.float32)
    expected = round_block(*[tensor.clone() for tensor in tensors], fmt)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(native_columns.round_block(*tensors, grid_of(fmt)), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_thresholds_are_those_of_encode_to_the_last_bit(name: str) -> None:
    fmt, grid = formats.get(name), grid_of(formats.get(name))
    assert grid is not None
    below = torch.nextafter(grid.thresholds, torch.zeros(7))
    one = torch.ones(7)
    assert fmt.encode(grid.thresholds, one).tolist() == list(range(1, 8))
    assert fmt.encode(below, one).tolist() == list(range(7))
    assert torch.equal(fmt.decode(torch.arange(8, dtype=torch.uint8), torch.ones(8)), grid.levels)


def test_a_format_without_such_a_grid_is_rounded_by_its_own_functions() -> None:
    assert grid_of(Lopsided()) is None
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    codes = gptq(
        w,
        factorize(x.T @ x, damping=0.01, act_order=True),
        Lopsided(),
        scales=round_to_nearest(w, formats.get("mxfp4")).scales,
    ).codes
    negative = codes.elements[codes.elements > 8]
    assert len(negative) > 20 and not (negative & 1).any()


def test_a_grid_may_leave_levels_unused() -> None:
    grid = grid_of(Coarse())
    assert grid is not None and grid.thresholds[3:].isnan().all()
    tensors = problem(16, 64, torch.float32)
    expected = round_block(*[tensor.clone() for tensor in tensors], Coarse())
    assert torch.equal(native_columns.round_block(*tensors, grid), expected)
    assert expected.max() == 11


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_takes_the_compiled_walk_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = native_columns.round_block
    monkeypatch.setattr(native_columns, "round_block", lambda *tensors, grid: calls.append(1) or real(*tensors, grid))
    x = torch.randn(512, 192, generator=torch.Generator().manual_seed(0))
    w = torch.randn(8, 192, generator=torch.Generator().manual_seed(1))
    fmt = formats.get(name)
    gptq(w, factorize(x.T @ x, damping=0.01, act_order=True), fmt, scales=round_to_nearest(w, fmt).scales)
    assert len(calls) == 2
