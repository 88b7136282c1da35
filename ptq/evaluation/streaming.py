"""Measure one pair of clips frame by frame, with bounded memory and a small thread pool.

The frame streams are read here, in order; each frame's arithmetic (which releases the interpreter lock) runs in the
pool, with at most a few frames in flight. The results are folded in frame order, so the numbers do not depend on the
pool.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptq.errors import DamagedFileError
from ptq.evaluation import measures

_MAX_WORKERS = 4


_Results = tuple[measures.FrameMeasures, measures.FrameMeasures, measures.PairMeasures]
"""Of one frame: in the reference, in the candidate, and of the two together."""


@dataclass(frozen=True)
class ClipPair:
    """Results of one pair: dimension -> value for each run, paired measures, and the pixel hashes of both clips,
    equal exactly when they show the same frames."""

    reference: dict[str, float | None]
    candidate: dict[str, float | None]
    paired: dict[str, float | None]
    hashes: tuple[str, str]
    first_frames: tuple[np.ndarray, np.ndarray]


def measure_clips(
    reference: Iterator[np.ndarray], candidate: Iterator[np.ndarray], *, stride: int = 1, name: str = "clip"
) -> ClipPair:
    """Measure two streams of uint8 [H, W, 3] frames.

    Args:
        stride: SSIM, sharpness and saturation are taken on every stride-th frame; all other measures on every frame
            (temporal ones are undefined on a subset).

    Raises:
        DamagedFileError: the streams differ in length or frame size (`name` says which unit).
    """
    workers = min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    results: list[_Results] = []
    hashes = hashlib.sha256(), hashlib.sha256()
    previous: tuple[np.ndarray, np.ndarray] | None = None
    first: tuple[np.ndarray, np.ndarray] | None = None
    pending: deque[Future[_Results]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for index, (ref, cand) in enumerate(itertools.zip_longest(reference, candidate, fillvalue=None)):
            if ref is None or cand is None:
                raise DamagedFileError(f"The two clips of {name} have different numbers of frames.")
            if ref.shape != cand.shape:
                raise DamagedFileError(f"The two clips of {name} have frames of sizes {ref.shape} and {cand.shape}.")
            first = first or (ref, cand)
            if len(pending) > workers:
                results.append(pending.popleft().result())
            pending.append(pool.submit(_measure, ref, cand, previous, index % stride == 0))
            for pixels, frame in zip(hashes, (ref, cand), strict=True):
                pixels.update(repr(frame.shape).encode())
                pixels.update(np.ascontiguousarray(frame).data)
            previous = (ref, cand)
        results.extend(future.result() for future in pending)
    if first is None:
        raise DamagedFileError(f"The clips of {name} have no frames.")
    of_reference, of_candidate, of_pairs = zip(*results, strict=True)
    runs = _fold_run(of_reference), _fold_run(of_candidate)
    energies = [run["motion_energy"] for run in runs]
    ratio = energies[1] / energies[0] if energies[0] and energies[1] is not None else None
    return ClipPair(
        reference=runs[0],
        candidate=runs[1],
        paired={**_fold_pair(of_pairs), "motion_energy_ratio": ratio},
        hashes=(hashes[0].hexdigest(), hashes[1].hexdigest()),
        first_frames=first,
    )


def _measure(
    ref: np.ndarray, cand: np.ndarray, previous: tuple[np.ndarray, np.ndarray] | None, spatial: bool
) -> _Results:
    before: tuple[Any, Any] = previous or (None, None)
    return (
        measures.measure_frame(ref, before[0], spatial=spatial),
        measures.measure_frame(cand, before[1], spatial=spatial),
        measures.measure_pair(ref, cand, previous, spatial=spatial),
    )


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _fold_run(frames: Sequence[measures.FrameMeasures]) -> dict[str, float | None]:
    """Values of one clip. temporal_flickering is VBench's: (255 - mean_t mean |f_(t+1) - f_t|) / 255, None for one
    frame.
    """
    delta = _mean([frame.delta_mae for frame in frames])
    frozen = sum(frame.delta_mae is not None and frame.delta_mae < measures.FROZEN_LEVELS for frame in frames)
    return {
        "temporal_flickering": None if delta is None else (measures.PEAK - delta) / measures.PEAK,
        "motion_energy": _mean([frame.delta_mse for frame in frames]),
        "sharpness": _mean([frame.sharpness for frame in frames]),
        "saturation": _mean([frame.saturation for frame in frames]),
        "frozen_frames": float(frozen),
        "black_frames": float(sum(frame.black for frame in frames)),
    }


def _fold_pair(pairs: Sequence[measures.PairMeasures]) -> dict[str, float | None]:
    """Paired values. PSNR is the mean over the frames that differ; identical frames (infinite PSNR) are counted
    apart.
    """
    errors = [pair.mse for pair in pairs]
    return {
        "psnr": _mean([measures.psnr_from_mse(mse) if mse > 0 else None for mse in errors]),
        "identical_frames": float(sum(mse == 0 for mse in errors)),
        "ssim": _mean([pair.ssim for pair in pairs]),
        "temporal_delta_mae": _mean([pair.delta_gap for pair in pairs]),
    }
