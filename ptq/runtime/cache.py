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

from torch import Tensor

DEFAULT_LIMIT_MB = 1024

State = tuple[int, int]
"""Version counter and address."""


class DecodedCache:
    """LRU map from stored tensors to what they decode to in float32, bounded in bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[tuple[int, ...], tuple[tuple[State, ...], Tensor, int]] = OrderedDict()

    def get(self, stored: tuple[Tensor, ...], nbytes: int, decode: Callable[[], Tensor]) -> Tensor | None:
        """What these tensors decode to, decoding them when absent; None when `nbytes` exceeds the limit.

        Args:
            stored: codes and scales of a weight, or a layer's learned blocks.
            nbytes: size of the decoded tensor.
        """
        if nbytes > self.limit_bytes:
            return None
        identity, states = tuple(map(id, stored)), tuple(map(tensor_state, stored))
        entry = self._entries.get(identity)
        if entry is not None and entry[0] == states:
            self._entries.move_to_end(identity)
            return entry[1]
        self._drop(identity)
        while self.used_bytes + nbytes > self.limit_bytes:
            self._drop(next(iter(self._entries)))
        decoded = decode()
        self._entries[identity] = (states, decoded, nbytes)
        self.used_bytes += nbytes
        for tensor in stored:
            weakref.finalize(tensor, self._drop, identity)
        return decoded

    def _drop(self, identity: tuple[int, ...]) -> None:
        entry = self._entries.pop(identity, None)
        if entry is not None:
            self.used_bytes -= entry[2]


def tensor_state(tensor: Tensor) -> State:
    """What changes when a tensor is written to or other storage is put behind it."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def from_environment() -> DecodedCache:
    """A cache with the limit that PTQ_DECODED_CACHE_MB asks for."""
    return DecodedCache(int(os.environ.get("PTQ_DECODED_CACHE_MB", DEFAULT_LIMIT_MB)) * 2**20)
