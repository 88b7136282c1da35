"""The compiled product of few rows with learned blocks against torch's, and which inputs take it."""

import pytest
import torch

from ptq.scheme import Scheme, native_blocks, native_input
from ptq.scheme import scheme as module
from ptq.scheme.learned import Learned, decode_blocks, encode_blocks, transform_input


def blocks(groups, size=64, seed=0):
    return decode_blocks(encode_blocks(torch.randn(groups, size, size, generator=torch.Generator().manual_seed(seed))))


CASES = [
    ((16, 64), 64),
    ((17, 192), 64),
    ((1, 48, 192), 64),
    ((2, 3, 8, 512), 128),
    ((256, 320), 64),
    ((255, 256), 128),
]


@pytest.mark.parametrize(("shape", "size"), CASES)
def test_exact_sums_are_exact(shape, size):
    x = torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(1)).float()
    a = torch.randint(-64, 65, (shape[-1] // size, size, size), generator=torch.Generator().manual_seed(2)).float()
    assert native_blocks.takes(x, a)
    wanted = torch.einsum("mgk,gkn->mgn", x.double().view(-1, len(a), size), a.double()).reshape(shape)
    assert torch.equal(native_blocks.change(x, a).double(), wanted)
    assert torch.equal(Learned(size).input(x, a).double(), wanted)


@pytest.mark.parametrize(("name", "rule"), [("mxfp4", "even"), ("hif4", "mse"), ("hif4", "p2")])
@pytest.mark.parametrize("rows", [16, 48, 255])
@pytest.mark.parametrize("size", native_blocks.SIZES)
def test_codes_are_those_of_torchs_product(name, rule, rows, size):
    scheme = Scheme.of(name, transform="learned", block=size, input_rule=rule)
    x, a = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)), blocks(512 // size, size)
    assert native_blocks.takes(x, a)
    found = scheme.format.quantize(Learned(size).input(x, a), scale_rule=rule).elements
    wanted = scheme.format.quantize(transform_input(x, a), scale_rule=rule).elements
    # With MKL on x86 the bits are the same; another library may add in another order.
    assert int((found != wanted).sum()) <= (0 if torch.backends.mkl.is_available() else x.numel() // 10_000)


def test_other_inputs_are_left_to_torch():
    x, a = torch.randn(16, 192), blocks(3)
    for other in (x[:15], x.expand(17, 16, 192), x.double(), x.to("meta"), x.bfloat16()):
        assert not native_blocks.takes(other, a)
        assert Learned(64).input(other, a.to(other.device)).shape == other.shape
    assert not native_blocks.takes(torch.randn(16, 96), blocks(3, 32))


def test_layouts_and_empty_rows():
    x, a = torch.randn(192, 32), blocks(3)
    assert torch.equal(native_blocks.change(x.T, a), native_blocks.change(x.T.contiguous(), a))
    assert Learned(64).input(torch.randn(0, 192), a).shape == (0, 192)


@pytest.mark.parametrize(("name", "rule"), [("mxfp4", "even"), ("hif4", "mse"), ("hif4", "p2"), ("mxfp4", "mse")])
@pytest.mark.parametrize(("rows", "size"), [(3, 64), (48, 64), (48, 128), (300, 128), (0, 64), (48, 32)])
def test_inputs_changed_and_rounded_at_once_are_the_same(name, rule, rows, size, monkeypatch):
    """What a layer computes on a CPU, against its parts; twice, because the first use compiles."""
    if size % Scheme.of(name).format.group_size:
        pytest.skip("blocks hold whole groups")
    scheme = Scheme.of(name, transform="learned", block=size, input_rule=rule)
    x, a = torch.randn(2, rows, 256, generator=torch.Generator().manual_seed(rows)), blocks(256 // size, size)
    x[0, 1:2, 70] = float("nan")
    kept, calls, once = x.clone(), [], native_input.quantized
    monkeypatch.setattr(native_input, "quantized", lambda *a, **k: calls.append(1) or once(*a, **k))
    module._compiled.cache_clear()
    wanted = scheme.format.fake_quantize(scheme.transform.input(x, a), scale_rule=rule)
    for _ in range(2):
        assert torch.equal(scheme.quantize_input(x, a).view(torch.int32), wanted.view(torch.int32))
    assert len(calls) == 2 and torch.equal(x.nan_to_num(7), kept.nan_to_num(7))
    module._compiled.cache_clear()


def test_what_is_not_changed_and_rounded_at_once():
    scheme, x, a = Scheme.of("hif4", transform="learned", block=64), torch.randn(20, 128), blocks(2)
    kernels = scheme.format.kernels("reference", "away")
    for other in (x.bfloat16(), x.double(), x[:, ::2], torch.randn(128, 20).T, torch.randn(20, 192)):
        assert native_input.quantized(other, a, kernels, 64) is None
    assert native_input.quantized(x, encode_blocks(a), kernels, 64) is None  # as stored
    wanted = scheme.quantize_input(x, a)
    assert torch.equal(scheme.quantize_input(x.bfloat16(), a), scheme.quantize_input(x.bfloat16().float(), a))
    assert torch.equal(scheme.quantize_input(x, encode_blocks(a)), wanted)
    assert torch.equal(scheme.quantize_input(x.T.contiguous().T, a), wanted)
