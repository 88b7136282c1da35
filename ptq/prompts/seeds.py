"""Seeds that depend on what is generated, never on order, filter, sharding or resume (specs: data, work units)."""

from __future__ import annotations

import hashlib


def unit_seed(base: int, dataset: str, sample_id: str, k: int) -> int:
    """base + first four bytes (big-endian) of blake2b("dataset|id|k")."""
    key = f"{dataset}|{sample_id}|{k}".encode()
    return base + int.from_bytes(hashlib.blake2b(key).digest()[:4], "big")
