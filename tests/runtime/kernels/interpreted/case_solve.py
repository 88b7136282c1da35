"""What a solve launches on a GPU, under the interpreter: GPTQ's columns and both conversions, against their definitions."""

import pytest
import torch

from ptq import formats
from ptq.runtime.conversion import KernelConversion
from ptq.scheme import Scheme
from ptq.scheme.learned import encode_blocks
from ptq.solvers.conversion import DEFINITION
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


@pytest.mark.parametrize(("name", "rule"), [("hif4", "mse"), ("hif4", "p2"), ("mxfp4", "even")])
def test_conversions_equal_their_definitions(name, rule):
    """In blocks of small powers of two every sum is exact, so the codes are equal."""
    generator = torch.Generator().manual_seed(7)
    scheme = Scheme.of(name, transform="learned", block=128, input_rule=rule)
    x = torch.randn(40, 256, generator=generator).bfloat16().float()
    basis = encode_blocks(torch.eye(128).roll(3, 0).repeat(2, 1, 1) * torch.tensor([1.0, 0.5]).repeat(64))
    found, expected = (conversion.input(x, basis, scheme) for conversion in (KernelConversion(), DEFINITION))
    assert found.dtype == torch.float32 and torch.equal(found, expected) and expected.unique().numel() > 15
    w = torch.randn(24, 128, generator=generator)
    for scale_rule in (None, rule):
        codes, by_definition = (c.weight(w, scheme.format, scale_rule) for c in (KernelConversion(), DEFINITION))
        assert torch.equal(codes.elements, by_definition.elements) and torch.equal(codes.scales, by_definition.scales)
    assert not KernelConversion.takes(scheme, torch.device("cpu"))
