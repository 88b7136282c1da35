"""The compiled product of few rows with learned blocks against torch's, and which inputs take it."""

import pytest
import torch

from ptq.scheme import Scheme, native_blocks
from ptq.scheme.learned import Learned, decode_blocks, encode_blocks, transform_input


def blocks(groups, size=64, seed=0):
    return decode_blocks(encode_blocks(torch.randn(groups, size, size, generator=torch.Generator().manual_seed(seed))))


@pytest.mark.parametrize("shape", [(16, 64), (17, 192), (1, 48, 192), (2, 3, 8, 512), (256, 320)])
def test_exact_sums_are_exact(shape):
    x = torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(1)).float()
    a = torch.randint(-64, 65, (shape[-1] // 64, 64, 64), generator=torch.Generator().manual_seed(2)).float()
    assert native_blocks.takes(x, a)
    wanted = torch.einsum("mgk,gkn->mgn", x.double().view(-1, len(a), 64), a.double()).reshape(shape)
    assert torch.equal(native_blocks.change(x, a).double(), wanted)
    assert torch.equal(Learned(64).input(x, a).double(), wanted)


@pytest.mark.parametrize(("name", "rule"), [("mxfp4", "even"), ("hif4", "mse"), ("hif4", "p2")])
@pytest.mark.parametrize("rows", [16, 48, 255])
def test_codes_are_those_of_torchs_product(name, rule, rows):
    scheme = Scheme.of(name, transform="learned", block=64, input_rule=rule)
    x, a = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)), blocks(8)
    assert native_blocks.takes(x, a)
    found = scheme.format.quantize(Learned(64).input(x, a), scale_rule=rule).elements
    wanted = scheme.format.quantize(transform_input(x, a), scale_rule=rule).elements
    # With MKL on x86 the bits are the same; another library may add in another order.
    assert int((found != wanted).sum()) <= (0 if torch.backends.mkl.is_available() else x.numel() // 10_000)


def test_other_inputs_are_left_to_torch():
    x, a = torch.randn(16, 192), blocks(3)
    for other in (x[:15], x.expand(17, 16, 192), x.double(), x.to("meta"), x.bfloat16()):
        assert not native_blocks.takes(other, a)
        assert Learned(64).input(other, a.to(other.device)).shape == other.shape
    assert not native_blocks.takes(torch.randn(16, 128), blocks(1, 128))


def test_layouts_and_empty_rows():
    x, a = torch.randn(192, 32), blocks(3)
    assert torch.equal(native_blocks.change(x.T, a), native_blocks.change(x.T.contiguous(), a))
    assert Learned(64).input(torch.randn(0, 192), a).shape == (0, 192)
