"""The built-in measures, as pure functions on uint8 RGB frames and on latents.

Legend: a frame is uint8 [H, W, 3] RGB; a level is one step of the 0..255 scale. Sums over pixels are exact (integers in
float64). Nothing here reads files or chooses which measure matters; `suites.py` does that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ptq.evaluation.ssim import ssim

PEAK = 255.0
FROZEN_LEVELS = 0.1
"""A frame is frozen when it differs from the one before by less than this mean absolute level (still content passed through
an encoder stays below 0.05; the slowest real motion measured was above 0.3)."""

BLACK_LEVEL, BLACK_SHARE = 16.0, 0.98
"""A frame is black when at least BLACK_SHARE of its pixels have a luma of BLACK_LEVEL (video black) or less."""

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class FrameMeasures:
    """One frame of one run. The temporal ones are None for the first frame, the spatial ones on skipped frames.

    delta_mae: mean |f_t - f_(t-1)| in levels; delta_mse: its square mean in levels squared.
    """

    delta_mae: float | None
    delta_mse: float | None
    sharpness: float | None
    saturation: float | None
    black: bool


@dataclass(frozen=True)
class PairMeasures:
    """One frame of a pair. `mse` in levels squared; `delta_gap`: mean |(r_t - r_(t-1)) - (c_t - c_(t-1))| in levels."""

    mse: float
    ssim: float | None
    delta_gap: float | None


def mean_square_and_abs(difference: np.ndarray) -> tuple[float, float]:
    """(mean of squares, mean of absolute values) of an integer array, exactly rounded sums."""
    values = np.abs(difference).astype(np.float64).ravel()
    return float(values @ values) / values.size, float(values.sum()) / values.size


def psnr_from_mse(mse: float) -> float:
    """PSNR in dB of a positive mean squared error in levels squared."""
    return 10.0 * math.log10(PEAK * PEAK / mse)


def luma(frame: np.ndarray) -> np.ndarray:
    """BT.601 luma, float32 [H, W] in levels."""
    return frame.astype(np.float32) @ _LUMA


def sharpness(luma_hw: np.ndarray) -> float:
    """Variance of the Laplacian (4 neighbours, mirrored border, as OpenCV's) of a luma image, in levels squared."""
    from scipy.ndimage import laplace

    return float(laplace(luma_hw, mode="mirror").var(dtype=np.float64))


def saturation(frame: np.ndarray) -> float:
    """Mean HSV saturation, (max - min) / max per pixel (0 for black), in [0, 1]."""
    red, green, blue = frame[..., 0], frame[..., 1], frame[..., 2]
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    return float(((high - low) / np.maximum(high, 1).astype(np.float32)).mean(dtype=np.float64))


def measure_frame(frame: np.ndarray, previous: np.ndarray | None, *, spatial: bool) -> FrameMeasures:
    """Measure one frame of one run; `spatial` also computes sharpness and saturation."""
    delta_mse = delta_mae = None
    if previous is not None:
        delta_mse, delta_mae = mean_square_and_abs(frame.astype(np.int16) - previous)
    grey = luma(frame)
    return FrameMeasures(
        delta_mae=delta_mae,
        delta_mse=delta_mse,
        sharpness=sharpness(grey) if spatial else None,
        saturation=saturation(frame) if spatial else None,
        black=float((grey <= BLACK_LEVEL).mean()) >= BLACK_SHARE,
    )


def measure_pair(
    reference: np.ndarray,
    candidate: np.ndarray,
    previous: tuple[np.ndarray, np.ndarray] | None,
    *,
    spatial: bool,
) -> PairMeasures:
    """Compare one frame of the reference with the candidate's; `previous` is the pair before it."""
    gap = candidate.astype(np.int16) - reference
    mse, _ = mean_square_and_abs(gap)
    delta_gap = None
    if previous is not None:
        _, delta_gap = mean_square_and_abs(gap - (previous[1].astype(np.int16) - previous[0]))
    return PairMeasures(mse, ssim(reference, candidate) if spatial else None, delta_gap)


def latent_error(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float | None]:
    """Distance of two latents of any one shape: relative L2 error, cosine similarity, SNR in dB (None when equal).

    Raises:
        ValueError: shapes differ, or a latent is not finite.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"latents of shapes {list(reference.shape)} and {list(candidate.shape)}")
    r, c = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    if not (np.isfinite(r).all() and np.isfinite(c).all()):
        raise ValueError("latents with NaN or infinite values")
    error, signal, other = float(np.linalg.norm(c - r)), float(np.linalg.norm(r)), float(np.linalg.norm(c))
    return {
        "latent_relative_l2": error / signal if signal else None,
        "latent_cosine": float(r @ c) / (signal * other) if signal and other else None,
        "latent_snr_db": 20.0 * math.log10(signal / error) if signal and error else None,
    }
