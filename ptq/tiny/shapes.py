"""The three flat shapes as signed distances, drawn anti-aliased; used by the renderer and the detectors.

All shapes share an origin at their centre of area and have nearly equal areas at one radius, so
that neither position nor size tells them apart. Not a drawing library: no rotation, no outlines.
"""

from __future__ import annotations

import functools

import numpy as np

SHAPES: tuple[str, ...] = ("circle", "triangle", "ring")
EXTENT = {"circle": 1.0, "triangle": 1.5, "ring": 1.15}
"""How far a shape reaches from its origin, in radii (of the worst axis)."""
_RING_HOLE = 0.56


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside); exact near edges, approximate near corners."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "triangle":
        # Equilateral, point up; circumradius 1.5 r, so inradius 0.75 r; the origin is the centroid.
        slanted = np.abs(x) * (3.0**0.5 / 2.0) - y / 2.0
        return np.maximum(slanted, y) - 0.75 * radius
    if shape == "ring":
        r = np.hypot(x, y)
        return np.maximum(r - EXTENT["ring"] * radius, _RING_HOLE * radius - r)
    raise ValueError(f"shape {shape!r} is unknown; choose from {', '.join(SHAPES)}")


def coverage(shape: str, cx: float, cy: float, radius: float, height: int, width: int) -> np.ndarray:
    """Share of each pixel inside the shape: float64 ``[H, W]`` in [0, 1]. Centre and radius in pixels."""
    x = np.arange(width)[None, :] + 0.5 - cx
    y = np.arange(height)[:, None] + 0.5 - cy
    return np.clip(0.5 - _distance(shape, x, y, radius), 0.0, 1.0)


@functools.lru_cache(maxsize=8)
def unit_area(shape: str) -> float:
    """Area of the shape at radius 1."""
    return float(coverage(shape, 128.0, 128.0, 64.0, 256, 256).sum()) / 64.0**2
