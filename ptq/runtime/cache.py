"""Decoded weights and learned blocks kept in memory up to a limit, so that small models do not decode them at every call.

The limit is in bytes over all layers of the process (environment variable PTQ_DECODED_CACHE_MB, default 1024). Least
recently used weights leave first. A weight larger than the whole limit is never cached: the layer then decodes it tile
by tile. Entries are identified by the identity, version counter and address of the stored tensors, so loading other codes or
scales into a layer invalidates them, and so does putting other storage behind a parameter, as offloading does.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")

DEFAULT_LIMIT_MB = 1024

State = tuple[int, int]
"""Version counter and address."""


class DecodedCache:
    """LRU map from stored tensors to what they decode to in float32, bounded in bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[tuple[int, ...], tuple[tuple[State, ...], Any, int]] = OrderedDict()

    def find(self, stored: tuple[Tensor | None, ...]) -> Any:
        """What is cached of these tensors, or None."""
        identity = tuple(map(id, stored))
        entry = self._entries.get(identity)
        if entry is None or entry[0] != tuple(map(tensor_state, stored)):
            return None
        self._entries.move_to_end(identity)
        return entry[1]

    def get(self, stored: tuple[Tensor | None, ...], nbytes: int, decode: Callable[[], T]) -> T | None:
        """What these tensors decode to, decoding them when absent; None when `nbytes` exceeds the limit.

        Args:
            stored: all that a layer holds, None for what it has not, or its learned blocks alone.
            nbytes: size of what is decoded.
        """
        if nbytes > self.limit_bytes:
            return None
        found: T | None = self.find(stored)
        if found is not None:
            return found
        identity, states = tuple(map(id, stored)), tuple(map(tensor_state, stored))
        self._drop(identity)
        while self.used_bytes + nbytes > self.limit_bytes:
            self._drop(next(iter(self._entries)))
        decoded = decode()
        self._entries[identity] = (states, decoded, nbytes)
        self.used_bytes += nbytes
        for tensor in stored:
            if tensor is not None:
                weakref.finalize(tensor, self._drop, identity)
        return decoded

    def _drop(self, identity: tuple[int, ...]) -> None:
        entry = self._entries.pop(identity, None)
        if entry is not None:
            self.used_bytes -= entry[2]


def tensor_state(tensor: Tensor | None) -> State:
    """What changes when a tensor is written to or other storage is put behind it."""
    if tensor is None:
        return 0, 0
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def from_environment() -> DecodedCache:
    """A cache with the limit that PTQ_DECODED_CACHE_MB asks for."""
    return DecodedCache(int(os.environ.get("PTQ_DECODED_CACHE_MB", DEFAULT_LIMIT_MB)) * 2**20)
