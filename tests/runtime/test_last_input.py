"""Layers on the CPU that read one tensor quantize it once, and never use a result of another tensor or another state of it."""

import gc

import pytest
import torch

from ptq.runtime import QuantLinear, last_input
from ptq.scheme import Scheme

SCHEME = Scheme.of("hif4", transform="smoothed", block=64)
SMOOTH = (1.0 + torch.arange(128) / 100).bfloat16()


def layer(seed: int, smooth: torch.Tensor = SMOOTH, scheme: Scheme = SCHEME) -> QuantLinear:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
    codes = scheme.format.quantize(scheme.transform.weight(weight, smooth))
    return QuantLinear.from_codes(codes, scheme, None, smooth.clone())


def expected(one: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    weight = one.scheme.format.dequantize(one.codes())
    return torch.nn.functional.linear(one.scheme.quantize_input(x, one.smooth), weight).to(x.dtype)


@pytest.fixture
def calls(monkeypatch):
    """One entry for every input that was quantized."""
    made, original = [], Scheme.quantize_input

    def counted(self, x, basis, *residual):
        made.append(tuple(x.shape))
        return original(self, x, basis, *residual)

    last_input.forget_input()
    monkeypatch.setattr(Scheme, "quantize_input", counted)
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
    for scheme, smooth in (
        (SCHEME, SMOOTH * 2),
        (Scheme.of("mxfp4", transform="smoothed", block=64), SMOOTH),
        (Scheme.of("hif4", transform="smoothed", block=32), SMOOTH),
        (Scheme.of("hif4", transform="smoothed", block=64, input_rule="mse"), SMOOTH),
    ):
        other = layer(0, smooth, scheme)
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
    assert last_input._last is not None
    del x
    gc.collect()
    assert last_input._last is None
