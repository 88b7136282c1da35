"""The quantized form of the last input, which the query, key and value projections of one attention share.

One result is kept, by identity and version of its input, and freed with the input.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ptq.runtime.cache import State, tensor_state

T = TypeVar("T")


class _Last(NamedTuple):
    x: weakref.ref[Tensor]
    version: int
    key: Hashable
    result: Any


_last: _Last | None = None
_digests: dict[int, tuple[State, bytes]] = {}
"""By the identity of a living basis: a dictionary of weak tensors would cost more than a small layer's product."""


def shared_input(x: Tensor, basis: Tensor | None, numerics: Hashable, quantize: Callable[[], T]) -> T:
    """`quantize()`, or what the previous call made of the same x with the same numerics.

    Layers that read one tensor in one basis (by value) share the result. Inference tensors carry no version
    counter, so a change in place could not be noticed: they are not shared.

    Args:
        x: the input. basis: smoothing vector or learned blocks.
        numerics: everything else that decides what `quantize` returns.
    """
    return shared_by_key(x, (value_key(basis), numerics), quantize)


def value_key(basis: Tensor | None) -> bytes | None:
    """The value of a basis as it is now, to compare."""
    return None if basis is None else _digest(basis)


def shared_by_key(x: Tensor, key: Hashable, quantize: Callable[[], T]) -> T:
    """`shared_input` with all of what decides beside x in `key`, `value_key` of the basis among it."""
    global _last
    if x.is_inference():
        return quantize()
    last = _last
    if last is not None and last.version == x._version and last.x() is x and last.key == key:
        return last.result
    _last = None  # freed before the next one is made
    result = quantize()
    _last = _Last(weakref.ref(x, _forget), x._version, key, result)
    return result


def forget_input() -> None:
    """Drop the shared result (benchmarks that repeat one input)."""
    global _last
    _last = None


def _forget(reference: weakref.ref[Tensor]) -> None:
    if _last is not None and _last.x is reference:
        forget_input()


def _digest(basis: Tensor) -> bytes:
    state, identity = tensor_state(basis), id(basis)
    known = _digests.get(identity)
    if known is None or known[0] != state:
        if known is None:  # an identity is taken again only after its tensor has gone
            weakref.finalize(basis, _digests.pop, identity, None)
        data = basis.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        known = _digests[identity] = (state, hashlib.sha256(data).digest())
    return known[1]
