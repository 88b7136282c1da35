"""`ptq evaluate --dry-run`: check that the runs pair and estimate time, memory and disk, without measuring anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ptq.evaluation.runs import pair_runs, read_run

SECONDS_PER_MEGAPIXEL = 0.25
"""Core-seconds for one million pixels of a frame pair, all measures (61 frames of 720p take 11.5, two thirds in SSIM)."""

_BYTES_PER_PIXEL, _BASE_BYTES, _BYTES_PER_LINE = 60, 150e6, 2500


def plan(reference: Path, candidate: Path, *, allow_missing: bool = False) -> dict[str, Any]:
    """Units that would be measured and an estimate: {units, excluded, seconds, memory_bytes, disk_bytes}.

    Raises:
        PtqError: as `evaluate_runs` would, for unpaired or incomplete runs.
    """
    pairing = pair_runs(read_run(reference), read_run(candidate), allow_missing=allow_missing)
    sizes = [
        (
            float(unit.record.get("width") or 0) * float(unit.record.get("height") or 0),
            float(unit.record.get("frames") or 0),
        )
        for unit, _ in pairing.pairs
    ]
    cores = min(4, len(os.sched_getaffinity(0)))
    return {
        "units": len(pairing.pairs),
        "excluded": len(pairing.excluded),
        "seconds": sum(pixels * frames for pixels, frames in sizes) / 1e6 * SECONDS_PER_MEGAPIXEL / cores,
        "memory_bytes": _BASE_BYTES + _BYTES_PER_PIXEL * max(pixels for pixels, _ in sizes),
        "disk_bytes": float(_BYTES_PER_LINE * len(pairing.pairs)),
    }
