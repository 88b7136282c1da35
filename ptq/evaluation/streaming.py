"""Measure one pair of clips frame by frame, with bounded memory and a small thread pool.

The frame streams are read here, in order; each frame's arithmetic (which releases the interpreter lock) runs in the
pool, with at most a few frames in flight. The results are folded in frame order, so the numbers do not depend on the
pool.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptq.errors import DamagedFileError
from ptq.evaluation import measures
from ptq.evaluation.frames import ContentHash

_MAX_WORKERS = 4


@dataclass
class _FrameResult:
    reference: measures.FrameMeasures
    candidate: measures.FrameMeasures
    pair: measures.PairMeasures


@dataclass(frozen=True)
class ClipPair:
    """Results of one pair: dimension -> value for each run, paired measures, and the pixel hashes of both clips."""

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
    results: list[_FrameResult] = []
    hashes = ContentHash(), ContentHash()
    previous: tuple[np.ndarray, np.ndarray] | None = None
    first: tuple[np.ndarray, np.ndarray] | None = None
    pending: deque[Future[_FrameResult]] = deque()
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
            hashes[0].update(ref)
            hashes[1].update(cand)
            previous = (ref, cand)
        results.extend(future.result() for future in pending)
    if first is None:
        raise DamagedFileError(f"The clips of {name} have no frames.")
    return ClipPair(
        reference=_fold_run([result.reference for result in results]),
        candidate=_fold_run([result.candidate for result in results]),
        paired=_fold_pair(results),
        hashes=(hashes[0].hexdigest(), hashes[1].hexdigest()),
        first_frames=first,
    )


def _measure(
    ref: np.ndarray, cand: np.ndarray, previous: tuple[np.ndarray, np.ndarray] | None, spatial: bool
) -> _FrameResult:
    before: tuple[Any, Any] = previous or (None, None)
    return _FrameResult(
        measures.measure_frame(ref, before[0], spatial=spatial),
        measures.measure_frame(cand, before[1], spatial=spatial),
        measures.measure_pair(ref, cand, previous, spatial=spatial),
    )


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _fold_run(frames: list[measures.FrameMeasures]) -> dict[str, float | None]:
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


def _fold_pair(results: list[_FrameResult]) -> dict[str, float | None]:
    """Paired values. PSNR is the mean over the frames that differ; identical frames (infinite PSNR) are counted
    apart.
    """
    errors = [result.pair.mse for result in results]
    energies = [_mean([run.delta_mse for run in runs]) for runs in
                ([r.reference for r in results], [r.candidate for r in results])]  # fmt: skip
    return {
        "psnr": _mean([measures.psnr_from_mse(mse) if mse > 0 else None for mse in errors]),
        "identical_frames": float(sum(mse == 0 for mse in errors)),
        "ssim": _mean([result.pair.ssim for result in results]),
        "temporal_delta_mae": _mean([result.pair.delta_gap for result in results]),
        "motion_energy_ratio": energies[1] / energies[0] if energies[0] and energies[1] is not None else None,
    }
