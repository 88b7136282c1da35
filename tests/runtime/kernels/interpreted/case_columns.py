"""GPTQ's columns under the interpreter, against the eager walk."""

import pytest
import torch

from ptq import formats
from ptq.solvers.gptq import round_block
from ptq.solvers.grid import grid_of
from ptq.solvers.triton_columns import round_block as round_block_triton

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize(("columns", "n"), [(128, 40), (7, 33), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_equal_the_eager_walk(name, columns, n, dtype):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(columns, n, generator=generator, dtype=dtype)
    target = weight + 0.1 * torch.randn(columns, n, generator=generator, dtype=dtype)
    steps = 0.05 + 0.4 * torch.rand(columns, n, generator=generator)
    # Above the diagonal nothing is read: a kernel that does not mask it is noticed.
    feedback = torch.randn(columns, columns, generator=generator, dtype=dtype) * 0.05
    fmt = formats.get(name)
    found_errors, errors, found_rest, rest = weight.clone(), weight.clone(), steps.clone(), steps.clone()
    found = round_block_triton(target.clone(), found_errors, found_rest, feedback, grid_of(fmt))
    expected = round_block(target.clone(), errors, rest, feedback, fmt)
    if dtype == torch.float64:
        assert torch.equal(found, expected) and torch.allclose(found_errors, errors, rtol=1e-12, atol=1e-12)
        assert torch.allclose(found_rest, rest, rtol=1e-6, atol=1e-7), "what was rounded away"
    else:
        assert (found != expected).float().mean() < 1e-3
