"""Detectors of the tiny world: colour, shape, direction, size and background read from frames, without a network.

Backgrounds are grey and shapes are vivid, so the mask is the chroma; colour is the mean inside the
mask, direction a line through the centroids, shape the best template overlap. Works on clips that
a model drew (blurred, off-colour) as well as on rendered ones. It judges no prompt text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ptq.tiny import shapes
from ptq.tiny.world import COLOURS, DIRECTIONS, SIZES, Scene

_MIN_CHROMA = 40.0
_MIN_AREA = 20.0
_COLOUR_WIDTH, _SHAPE_WIDTH, _ANGLE_WIDTH = 8.0, 0.04, 9.0
"""Width of the soft scores: how fast they saturate with the margin of the asked-for answer."""

_COLOUR_NAMES = tuple(COLOURS)
_COLOUR_TABLE = np.array([COLOURS[name] for name in _COLOUR_NAMES], dtype=np.float64)
_DIRECTION_NAMES = tuple(DIRECTIONS)
_DIRECTION_TABLE = np.array([DIRECTIONS[name] for name in _DIRECTION_NAMES])


@dataclass(frozen=True)
class Detection:
    """What a clip shows. The names are ``None`` when no vivid object is found.

    ``colour_distance`` (RGB distance, 0-441), ``shape_overlap`` (soft IoU with the template, 0-1) and
    ``angle_error`` (degrees) hold a value for every name. ``displacement`` is the length of the
    fitted path in pixels of a 64-pixel frame, ``path_error`` the centroids' rms distance from it,
    ``visible`` the share of frames with an object.
    """

    colour: str | None
    shape: str | None
    direction: str | None
    size: str | None
    background: str
    colour_distance: dict[str, float]
    shape_overlap: dict[str, float]
    angle_error: dict[str, float]
    displacement: float
    path_error: float
    visible: float


def object_mask(frames: np.ndarray) -> np.ndarray:
    """Soft mask float64 ``[T, H, W]`` in [0, 1] of the vivid object in uint8 ``[T, H, W, 3]`` frames."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    rgb = frames.astype(np.float64)
    chroma = rgb.max(-1) - rgb.min(-1)
    # The object's own chroma: a high quantile over the whole clip, so that one bad frame does not set it.
    peak = np.quantile(chroma, 0.985)
    if peak < _MIN_CHROMA:
        return np.zeros_like(chroma)
    return np.clip((chroma / peak - 0.15) / 0.7, 0.0, 1.0)


def _overlaps(mask: np.ndarray, cx: float, cy: float, area: float) -> np.ndarray:
    """Soft IoU of one frame's mask with each shape's template of the same area and centroid."""
    height, width = mask.shape
    out = np.zeros(len(shapes.SHAPES))
    for i, name in enumerate(shapes.SHAPES):
        radius = math.sqrt(area / shapes.unit_area(name))
        template = shapes.coverage(name, cx, cy, radius, height, width)
        out[i] = np.minimum(mask, template).sum() / np.maximum(mask, template).sum()
    return out


def _path(times: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, float]:
    """Least-squares velocity (per frame) of ``points`` [N, 2] and the rms distance from the line."""
    t = times - times.mean()
    centred = points - points.mean(0)
    velocity = (t[:, None] * centred).sum(0) / max(float((t * t).sum()), 1e-9)
    rest = centred - t[:, None] * velocity
    return velocity, float(np.sqrt((rest**2).sum(1).mean()))


def _background(frames: np.ndarray, mask: np.ndarray) -> str:
    """Name of the background from grey levels outside the (dilated) object."""
    outside = mask < 0.05
    grey = frames.astype(np.float64).mean(-1)
    weight = outside.sum((0, 1))
    columns = (grey * outside).sum((0, 1))[weight > 0] / weight[weight > 0]
    if columns.size == 0:
        return "grey"
    if columns.std() > 12.0:
        return "striped"
    level = float(np.median(columns))
    return "black" if level < 68 else "grey" if level < 172 else "white"


def detect(frames: np.ndarray) -> Detection:
    """Measure a clip: uint8 ``[T, H, W, 3]`` RGB frames, T >= 2 for a direction."""
    mask = object_mask(frames)
    count, height, width = mask.shape
    scale = min(height, width) / 64.0
    xs, ys = np.arange(width) + 0.5, np.arange(height) + 0.5
    areas = mask.sum((1, 2))
    seen = areas >= _MIN_AREA * scale**2
    centroids = np.full((count, 2), np.nan)
    background = _background(frames, mask)
    if not seen.any():
        none = Detection(
            None, None, None, None, background, dict.fromkeys(_COLOUR_NAMES, 441.7), dict.fromkeys(shapes.SHAPES, 0.0),
            dict.fromkeys(_DIRECTION_NAMES, 180.0), 0.0, 0.0, 0.0,
        )  # fmt: skip
        return none
    overlaps = np.zeros(len(shapes.SHAPES))
    for t in np.flatnonzero(seen):
        cx, cy = (mask[t].sum(0) @ xs) / areas[t], (mask[t].sum(1) @ ys) / areas[t]
        centroids[t] = cx, cy
        overlaps += _overlaps(mask[t], cx, cy, areas[t])
    overlaps /= seen.sum()
    solid = (mask > 0.8) & seen[:, None, None]
    mean = frames[solid].astype(np.float64).mean(0) if solid.any() else np.full(3, 127.0)
    distance = np.sqrt(((_COLOUR_TABLE - mean) ** 2).sum(1))
    direction, angles, displacement, path_error = None, np.full(len(_DIRECTION_NAMES), 180.0), 0.0, 0.0
    if seen.sum() >= 2:
        velocity, path_error = _path(np.flatnonzero(seen).astype(np.float64), centroids[seen])
        speed = float(np.hypot(*velocity))
        displacement = speed * (count - 1) / scale
        if displacement > 2.0:
            angles = np.degrees(np.arccos(np.clip(_DIRECTION_TABLE @ velocity / speed, -1.0, 1.0)))
            direction = _DIRECTION_NAMES[int(angles.argmin())]
    area = float(areas[seen].mean()) / scale**2
    middle = math.pi * SIZES["small"] * SIZES["large"]
    return Detection(
        colour=_COLOUR_NAMES[int(distance.argmin())],
        shape=shapes.SHAPES[int(overlaps.argmax())],
        direction=direction,
        size="small" if area < middle else "large",
        background=background,
        colour_distance=dict(zip(_COLOUR_NAMES, distance.tolist(), strict=True)),
        shape_overlap=dict(zip(shapes.SHAPES, overlaps.tolist(), strict=True)),
        angle_error=dict(zip(_DIRECTION_NAMES, angles.tolist(), strict=True)),
        displacement=displacement,
        path_error=path_error / scale,
        visible=float(seen.mean()),
    )


def _soft(margin: float, width: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, margin / width))))


def adherence(frames: np.ndarray, scene: Scene) -> dict[str, float]:
    """How well uint8 ``[T, H, W, 3]`` frames show ``scene``.

    ``colour``, ``shape``, ``direction``: soft scores in [0, 1], growing with the margin by which the
    asked-for answer beats the best other one (0.5 is a tie), times the share of frames that show an
    object; direction also falls when the object hardly moves. ``*_hit``: 1.0 when the detector's
    answer is the asked-for one, else 0.0.
    """
    found = detect(frames)
    hits = {
        "colour_hit": float(found.colour == scene.colour),
        "shape_hit": float(found.shape == scene.shape),
        "direction_hit": float(found.direction == scene.direction),
    }
    if found.colour is None:
        return {"colour": 0.0, "shape": 0.0, "direction": 0.0, **hits}

    def margin(values: dict[str, float], name: str, sign: float) -> float:
        return sign * (values[name] - (max if sign > 0 else min)(v for k, v in values.items() if k != name))

    moved = min(1.0, found.displacement / 9.0)
    return {
        "colour": found.visible * _soft(margin(found.colour_distance, scene.colour, -1.0), _COLOUR_WIDTH),
        "shape": found.visible * _soft(margin(found.shape_overlap, scene.shape, 1.0), _SHAPE_WIDTH),
        "direction": found.visible * moved * _soft(45.0 - found.angle_error[scene.direction], _ANGLE_WIDTH),
        **hits,
    }
