"""Layers on the CPU that read one tensor quantize it once, and never use a result of another tensor or another state of it."""

import gc

import pytest
import torch

from ptq import formats
from ptq.runtime import QuantLinear, QuantSpec, sharing

SPEC = QuantSpec("hif4", 64, True)
SMOOTH = (1.0 + torch.arange(128) / 100).bfloat16()


def layer(seed: int, smooth: torch.Tensor = SMOOTH, spec: QuantSpec = SPEC) -> QuantLinear:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
    codes = formats.get(spec.format).quantize(spec.transform_weight(weight, smooth))
    return QuantLinear.from_codes(codes, spec, None, smooth.clone())


def expected(one: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    codes = formats.get(one.spec.format).dequantize(one.codes())
    return torch.nn.functional.linear(one.spec.quantize_input(x, one.smooth), codes).to(x.dtype)


@pytest.fixture
def calls(monkeypatch):
    """One entry for every input that was quantized."""
    made, original = [], QuantSpec.quantize_input

    def counted(self, x, smooth):
        made.append(tuple(x.shape))
        return original(self, x, smooth)

    sharing.forget_input()
    monkeypatch.setattr(QuantSpec, "quantize_input", counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_of_one_input_quantize_it_once(calls, dtype):
    x = torch.randn(2, 5, 128).to(dtype)
    query, key, value = layer(0), layer(1), layer(2)
    results = [query(x), key(x), value(x)]
    assert len(calls) == 1
    assert all(torch.equal(y, expected(one, x)) for y, one in zip(results, (query, key, value), strict=True))


def test_another_smoothing_or_format_is_quantized_anew(calls):
    x = torch.randn(5, 128)
    layer(0)(x)
    for spec, smooth in (
        (SPEC, SMOOTH * 2),
        (QuantSpec("mxfp4", 64, True), SMOOTH),
        (QuantSpec("hif4", 32, True), SMOOTH),
    ):
        other = layer(0, smooth, spec)
        wanted = expected(other, x)
        calls.clear()
        assert torch.equal(other(x), wanted)
        assert len(calls) == 1


def test_another_tensor_or_another_state_of_it_is_quantized_anew(calls):
    x, one = torch.randn(5, 128), layer(0)
    first = one(x)
    x[0, 0] = 50.0
    assert not torch.equal(one(x), first) and torch.equal(one(x), expected(one, x))
    with torch.no_grad():
        one.smooth.fill_(2.0)
    assert torch.equal(one(x), expected(one, x))
    calls.clear()
    one(x)
    assert len(calls) == 0
    one(x.clone())
    assert len(calls) == 1


def test_inference_tensors_are_not_shared(calls):
    with torch.inference_mode():
        x, one = torch.randn(5, 128), layer(0)
        one(x)
        x[0, 0] = 50.0
        assert torch.equal(one(x), expected(one, x))
    assert len(calls) == 3


def test_the_result_is_freed_with_its_input(calls):
    x = torch.randn(5, 128)
    layer(0)(x)
    assert sharing._last is not None
    del x
    gc.collect()
    assert sharing._last is None
