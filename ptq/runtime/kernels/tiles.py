"""Tile sizes of the matrix products: a checked-in table, no autotuning while someone waits for a video.

Looked up by (kernel, capability family, row bucket, N, K), first for the exact shape, then for any shape. The entries
are chosen from compiled code: no spills, shared memory within the limit, FP8 or block-scaled instructions (asserted by
the tests for every entry). `scripts/gpu_suite.py --tune` measures candidates on a GPU and names the faster ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ptq.errors import PtqError


@dataclass(frozen=True)
class Tile:
    """One program's share of a matrix product.

    Attributes:
        m, n, k: tile of rows, output features and input features.
        warps, stages: of the compiled kernel.
        group: row tiles walked before the next column of tiles.
    """

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 3
    group: int = 8

    @property
    def options(self) -> dict[str, int]:
        """Compiler options. Contraction is off: an epilogue that quantizes must round where its reference does."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


ROW_BUCKETS = (16, 64, 256, 2048)
"""Upper ends of the row buckets; more rows are in bucket MANY."""
MANY = 0
SMALL = (16, 64, 256)
ALL = (*ROW_BUCKETS, MANY)

Key = tuple[str, int, int, tuple[int, int] | None]
"""(kernel, capability family, row bucket, (N, K) or None for any shape)."""


def _entries(kernel: str, families: tuple[int, ...], buckets: tuple[int, ...], tile: Tile) -> dict[Key, Tile]:
    return {(kernel, family, bucket, None): tile for family in families for bucket in buckets}


TILES: dict[Key, Tile] = {
    # 128x256 needs 191 registers and 229,408 bytes on sm_90. On sm_100 it spills with row factors. Three stages are faster where
    # there are many columns: 1577 against 1384 TFLOP/s on an H200 with [32760, 5120] x [13824, 5120].
    **_entries("gemm_fp8", (90, 100, 120), SMALL, Tile(64, 128, 128, warps=4, stages=3)),
    **_entries("gemm_fp8", (90, 100), (2048,), Tile(128, 128, 128, stages=4)),
    **_entries("gemm_fp8", (90,), (MANY,), Tile(128, 256, 128, stages=4)),
    **_entries("gemm_fp8", (100,), (MANY,), Tile(128, 128, 128, stages=4)),
    **_entries("gemm_fp8", (120,), (2048, MANY), Tile(128, 128, 128, stages=3)),
    ("gemm_fp8", 90, MANY, (13824, 5120)): Tile(128, 256, 128, stages=3),
    **_entries("gemm_packed", (80, 90, 100, 120), (16,), Tile(16, 64, 128, warps=4, stages=3)),
    **_entries("gemm_packed", (80, 90, 100, 120), (64, 256, 2048, MANY), Tile(64, 64, 128, warps=4, stages=3)),
    **_entries("gemm_dot_scaled", (100,), SMALL, Tile(128, 128, 256, warps=4, stages=4)),
    **_entries("gemm_dot_scaled", (100,), (2048, MANY), Tile(128, 256, 256, stages=4)),
    **_entries("gemm_dot_scaled", (120,), ALL, Tile(128, 128, 128, stages=4)),
}


def tile_for(kernel: str, device: torch.device, m: int, n: int, k: int) -> Tile:
    """The tile of `kernel` for M rows on a device.

    Raises:
        PtqError: the table has no entry for this kernel on this capability.
    """
    return lookup(kernel, capability_family(device), m, n, k)


def lookup(kernel: str, family: int, m: int, n: int, k: int) -> Tile:
    """`tile_for` by capability family (80, 90, 100, 120)."""
    bucket = row_bucket(m)
    for shape in ((n, k), None):
        tile = TILES.get((kernel, family, bucket, shape))
        if tile is not None:
            return tile
    raise PtqError(f"Kernel {kernel} has no tile for compute capability {family / 10:.0f}.x with {m} rows.")


def row_bucket(m: int) -> int:
    """M -> the upper end of its bucket, MANY above the last."""
    return next((limit for limit in ROW_BUCKETS if m <= limit), MANY)


def capability_family(device: torch.device) -> int:
    """Major compute capability times ten: 8.9 is 80, 10.3 is 100. The CPU (interpreter) takes sm_90's tiles."""
    return torch.cuda.get_device_capability(device)[0] * 10 if device.type == "cuda" else 90


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device (3 under the interpreter: uneven shares on purpose)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
