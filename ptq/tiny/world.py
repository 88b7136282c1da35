"""The tiny world: scenes and a renderer of short clips, deterministic from integer seeds.

One flat shape of one colour crosses a plain or striped background in one of four directions.
This file holds the attribute tables, the :class:`Scene`, the split into training and held-out
scenes and the renderer. Prompts are in ``grammar.py``, measuring in ``detect.py``; no model here.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from ptq.tiny import shapes

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (240, 130, 20),
    "yellow": (235, 215, 30),
    "green": (30, 170, 50),
    "cyan": (30, 200, 205),
    "blue": (35, 70, 225),
    "purple": (130, 45, 200),
    "pink": (240, 60, 160),
}
SHAPES: tuple[str, ...] = shapes.SHAPES
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "down": (0.0, 1.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
}
"""Unit vectors (dx, dy) in image coordinates: y grows downwards."""

BACKGROUNDS: tuple[str, ...] = ("black", "grey", "white", "striped")
SIZES: dict[str, float] = {"small": 9.5, "large": 13.5}
ABSENT = frozenset({("ring", "small")})
"""Combinations the small VAE cannot resolve."""

_LEVELS = {"black": 20.0, "grey": 115.0, "white": 228.0}
_STRIPES = (85.0, 150.0)
"""Grey level of each plain background, and the two between which the striped one alternates."""

_STRIPE_PERIOD = 16.0
_TRAVEL = (17.0, 22.0)
"""Path length in pixels at 64x64, whatever the number of frames."""

_SPLIT_SEED = 20260
_HELD_OUT_SHARE = 0.2
_GRID_SHAPES = ("circle", "square", "triangle", "cross", "ring")
_GRID_DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
"""The split is drawn over a wider grid than the world uses, so that it stays as it is if the world grows."""


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for. Every field is one of this file's attribute names."""

    shape: str
    colour: str
    direction: str
    background: str
    size: str

    def __post_init__(self) -> None:
        tables = {
            "shape": SHAPES,
            "colour": tuple(COLOURS),
            "direction": tuple(DIRECTIONS),
            "background": BACKGROUNDS,
            "size": tuple(SIZES),
        }
        for name, allowed in tables.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is not in the tiny world; choose from {', '.join(allowed)}")
        if (self.shape, self.size) in ABSENT:
            raise ValueError(
                f"there is no {self.size} {self.shape} in the tiny world: its hole would be lost in the latent"
            )


@functools.lru_cache(maxsize=1)
def _split() -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    grid = list(itertools.product(_GRID_SHAPES, COLOURS, _GRID_DIRECTIONS, BACKGROUNDS, SIZES))
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(grid))
    held = round(len(grid) * _HELD_OUT_SHARE)

    def pick(part: np.ndarray) -> tuple[Scene, ...]:
        rows = (grid[i] for i in part)
        return tuple(Scene(*r) for r in rows if r[0] in SHAPES and r[2] in DIRECTIONS and (r[0], r[4]) not in ABSENT)

    return pick(order[held:]), pick(order[:held])


def train_scenes() -> tuple[Scene, ...]:
    """The scenes (attribute combinations) that training and calibration may use, in a fixed order."""
    return _split()[0]


def held_out_scenes() -> tuple[Scene, ...]:
    """The scenes kept for evaluation: never trained on, never calibrated on. Fixed order."""
    return _split()[1]


def _background(name: str, height: int, width: int) -> np.ndarray:
    scale = min(height, width) / 64.0
    if name in _LEVELS:
        return np.full((height, width), _LEVELS[name])
    x = (np.arange(width) + 0.5) / scale
    # A clipped triangle wave: stripes with one-pixel soft edges.
    wave = np.abs((x / _STRIPE_PERIOD) % 1.0 - 0.5) * 2.0 - 0.5
    mix = np.clip(0.5 + wave * _STRIPE_PERIOD / 2.0, 0.0, 1.0)
    row = _STRIPES[0] + (_STRIPES[1] - _STRIPES[0]) * mix
    return np.broadcast_to(row, (height, width)).copy()


def render(
    scene: Scene,
    rng: np.random.Generator | int,
    num_frames: int = 9,
    height: int = 64,
    width: int = 64,
) -> np.ndarray:
    """Draw ``scene`` as uint8 ``[T, H, W, 3]`` RGB.

    ``rng`` (an integer seed or a Generator) decides only what prompts do not name: where the path
    lies and how long it is (17 to 22 pixels at 64x64). The shape stays
    inside the frame.
    """
    gen = np.random.default_rng(rng)
    scale = min(height, width) / 64.0
    radius = SIZES[scene.size] * scale
    extent = shapes.EXTENT[scene.shape] * radius + 0.5
    unit = np.array(DIRECTIONS[scene.direction])
    length = gen.uniform(*_TRAVEL) * scale
    half = np.abs(unit) * length / 2.0
    lo = half + extent
    hi = np.array([width, height]) - half - extent
    slack = gen.uniform(0.0, 1.0, size=2)
    mid = np.where(hi > lo, lo + (hi - lo) * slack, np.array([width, height]) / 2.0)
    back = _background(scene.background, height, width)[..., None]
    colour = np.array(COLOURS[scene.colour], dtype=np.float64)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for t in range(num_frames):
        along = (t / (num_frames - 1) - 0.5) if num_frames > 1 else 0.0
        cx, cy = mid + unit * length * along
        alpha = shapes.coverage(scene.shape, cx, cy, radius, height, width)[..., None]
        frames[t] = np.round(back * (1.0 - alpha) + colour * alpha).astype(np.uint8)
    return frames
