"""Structural similarity, equal to scikit-image with gaussian_weights and five times as fast.

Gaussian window of 11 x 11 pixels, sigma 1.5, population covariance, K1 = 0.01, K2 = 0.03, mean over the pixels whose
window lies inside the frame and over the three channels (Wang et al. 2004, as in
`skimage.metrics.structural_similarity(a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5,
use_sample_covariance=False, data_range=255)`).

Why not call scikit-image: it takes 0.36 s for one 720p frame on one core, this takes 0.07 s, both in float64. The
formula needs only four filtered images (x, y, xy, x^2 + y^2) and only where the window fits; each pass is a product with
a banded matrix over tiles that stay in the cache, so that the work is done by BLAS. Every product is kept below the size
(262144 multiplications) from which OpenBLAS starts threads: callers run several frames at once, and nested threads made
it ten times slower.
"""

from __future__ import annotations

import functools

import numpy as np

_RADIUS = 5
_SIGMA = 1.5
_PEAK = 255.0
_TILE_ROWS, _TILE_COLUMNS, _BLOCK = 32, 160, 32


@functools.cache
def _band(size: int) -> np.ndarray:
    """Filter as a matrix [size, size + 10]: row i holds the window at columns i .. i + 10."""
    window = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    window /= window.sum()
    matrix = np.zeros((size, size + 2 * _RADIUS))
    for row in range(size):
        matrix[row, row : row + window.size] = window
    return matrix


def _filter(images: np.ndarray) -> np.ndarray:
    """Filter a tile [4, 3, h + 10, w + 10] to [4, 3 h, w] (valid positions only; the channels are stacked as rows)."""
    height, width = images.shape[2] - 2 * _RADIUS, images.shape[3] - 2 * _RADIUS
    vertical = (_band(height) @ images).reshape(4, 3 * height, width + 2 * _RADIUS)
    result = np.empty((4, 3 * height, width))
    for start in range(0, width, _BLOCK):
        size = min(_BLOCK, width - start)
        np.matmul(
            vertical[..., start : start + size + 2 * _RADIUS], _band(size).T, out=result[..., start : start + size]
        )
    return result


def _tile_sum(first: np.ndarray, second: np.ndarray) -> float:
    """Sum of the SSIM map over one tile with its margins, uint8 [h + 10, w + 10, 3]."""
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    x = np.ascontiguousarray(first.transpose(2, 0, 1), dtype=np.float64)
    y = np.ascontiguousarray(second.transpose(2, 0, 1), dtype=np.float64)
    mean_x, mean_y, mean_xy, mean_squares = _filter(np.stack([x, y, x * y, x * x + y * y]))
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    numerator = (2 * product + c1) * (2 * (mean_xy - product) + c2)
    return float((numerator / ((squares + c1) * (mean_squares - squares + c2))).sum())


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Mean SSIM of two uint8 [H, W, 3] frames, H and W at least 11; 1.0 for equal frames.

    Raises:
        ValueError: shapes differ or a side is shorter than the window.
    """
    height, width = first.shape[0] - 2 * _RADIUS, first.shape[1] - 2 * _RADIUS
    if first.shape != second.shape or min(height, width) < 1:
        raise ValueError(f"SSIM needs two frames of one size, at least 11x11; got {first.shape} and {second.shape}")
    total = 0.0
    for top in range(0, height, _TILE_ROWS):
        rows = slice(top, min(top + _TILE_ROWS, height) + 2 * _RADIUS)
        for left in range(0, width, _TILE_COLUMNS):
            columns = slice(left, min(left + _TILE_COLUMNS, width) + 2 * _RADIUS)
            total += _tile_sum(first[rows, columns], second[rows, columns])
    return total / (3 * height * width)
