"""The cache of decoded weights: limit, order of eviction, and that changed or freed codes never come back."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

import pytest
import torch

from ptq import formats
from ptq.runtime import QuantLinear, cpu
from ptq.runtime.cache import DecodedCache, from_environment
from ptq.scheme import Scheme
from ptq.scheme.learned import encode_blocks


def codes() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)


def weight(count: int = 10) -> torch.Tensor:
    return torch.zeros(count)


def never() -> torch.Tensor:
    raise AssertionError("decoded again although it was cached")


def test_a_weight_is_decoded_once() -> None:
    cache, key = DecodedCache(100), codes()
    first = cache.get(key, 40, weight)
    assert cache.get(key, 40, never) is first and cache.used_bytes == 40


def test_a_weight_over_the_limit_is_not_decoded_at_all() -> None:
    cache = DecodedCache(39)
    assert cache.get(codes(), 40, never) is None and cache.used_bytes == 0


def test_least_recently_used_leaves_first() -> None:
    cache, keys = DecodedCache(100), [codes() for _ in range(3)]
    a, b = (cache.get(key, 40, weight) for key in keys[:2])
    assert cache.get(keys[0], 40, never) is a  # now b is the oldest
    cache.get(keys[2], 40, weight)
    assert cache.used_bytes == 80
    assert cache.get(keys[0], 40, never) is a
    assert cache.get(keys[1], 40, weight) is not b and cache.used_bytes == 80


@pytest.mark.parametrize("part", [0, 1])
def test_codes_written_in_place_are_decoded_again(part: int) -> None:
    cache, key = DecodedCache(100), codes()
    old = cache.get(key, 40, weight)
    key[part].add_(1)
    assert cache.get(key, 40, weight) is not old
    assert cache.used_bytes == 40


@pytest.mark.parametrize("part", [0, 1])
def test_memory_goes_with_the_codes(part: int) -> None:
    cache, key = DecodedCache(100), list(codes())
    cache.get(key, 40, weight)
    key[part] = None
    gc.collect()
    assert cache.used_bytes == 0


def test_limit_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQ_DECODED_CACHE_MB", "3")
    assert from_environment().limit_bytes == 3 * 2**20
    monkeypatch.delenv("PTQ_DECODED_CACHE_MB")
    assert from_environment().limit_bytes == 1024 * 2**20


def layer(seed: int) -> QuantLinear:
    """With learned blocks, which are decoded and cached as the weight is."""
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    blocks = encode_blocks(torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(seed)))
    codes = formats.get("mxfp4").quantize(values)
    bias = torch.full((8,), float(seed), dtype=torch.bfloat16)  # computed with in float32
    return QuantLinear.from_codes(codes, Scheme.of("mxfp4", transform="learned", block=64), bias, blocks)


def replace_scale(target: QuantLinear, source: QuantLinear) -> None:
    target.weight_scale = source.weight_scale
    with torch.no_grad():
        target.weight_packed.copy_(source.weight_packed)


def replace_storage(target: QuantLinear, source: QuantLinear) -> None:
    for name in ("weight_packed", "weight_scale", "transform", "bias"):
        getattr(target, name).data = getattr(source, name).data


CHANGES: dict[str, Callable[[QuantLinear, QuantLinear], object]] = {
    "load_state_dict": lambda a, b: a.load_state_dict(b.state_dict()),
    "load_state_dict assign": lambda a, b: a.load_state_dict(b.state_dict(), assign=True),
    "scale only": lambda a, b: setattr(a, "weight_scale", torch.nn.Parameter(a.weight_scale + 1, requires_grad=False)),
    "scale in place": lambda a, b: a.weight_scale.add_(1),
    "scale as a new tensor": replace_scale,
    "other storage behind the parameters": replace_storage,
    "bias only": lambda a, b: setattr(a, "bias", b.bias),
    "bias in place": lambda a, b: a.bias.copy_(b.bias),
    "no bias": lambda a, b: setattr(a, "bias", None),
    "blocks only": lambda a, b: setattr(a, "transform", b.transform),
    "blocks in place": lambda a, b: a.transform.copy_(b.transform),
    "storage of the blocks": lambda a, b: setattr(a.transform, "data", b.transform.data),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_given_other_codes_computes_with_them(change: str) -> None:
    a, b, x = layer(1), layer(2), torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    before = a(x)
    assert torch.equal(a(x), before)
    CHANGES[change](a, b)
    after = a(x)
    assert not torch.equal(after, before)
    bias = None if a.bias is None else a.bias.float()
    expected = torch.nn.functional.linear(
        a.scheme.quantize_input(x, a.transform), formats.get("mxfp4").dequantize(a.codes()), bias
    )
    assert torch.equal(after, expected)


def test_one_weight_under_two_schemes() -> None:
    """What is kept of a layer is of its tensors; how its input is rounded is asked at every call."""
    x, packed = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)), layer(1).packed
    others = [
        dataclasses.replace(packed, scheme=dataclasses.replace(packed.scheme, input_rule=r)) for r in ("even", "ceil")
    ]
    for weight in (packed, *others, packed):
        wanted = weight.scheme.quantize_input(x, weight.basis) @ weight.decode().T + 1
        torch.testing.assert_close(cpu.linear(x, weight), wanted)
