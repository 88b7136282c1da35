"""Which measures exist, what they mean, and which of them a suite's gate counts.

A dimension enters a gate only when a higher value is better without reservation and zero means "nothing right", so that
(B - Q) / B reads as a loss: prompt adherence and VBench's dimensions. Sharpness, saturation and motion energy do not:
noise sharpens, a frozen clip flickers least. They are shown beside the gate. PSNR and SSIM between two samples measure
how far the trajectories drifted apart, which they do even at FP8; they are never counted.

Suites: `core` (no gate), `tiny` (the embedded world), and the VBench presets, which are data files in `presets/`; the settings
that videos are made with for one are those of `ptq generate --preset` of that name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from ptq.errors import UsageError
from ptq.wan.presets import BOUNDARY, named_settings

RUN_DIMENSIONS: Mapping[str, str] = {
    "temporal_flickering": "temporal flickering (VBench; blur raises it)",
    "motion_energy": "motion energy, mean squared frame difference",
    "sharpness": "sharpness, variance of the Laplacian",
    "saturation": "saturation",
    "frozen_frames": "frozen frames per video",
    "black_frames": "black frames per video",
}
"""Informative dimensions of every run, with the words of the tables."""
PAIRED_MEASURES: Mapping[str, str] = {
    "psnr": "PSNR of frames that differ (dB)",
    "identical_frames": "identical frames per video",
    "ssim": "SSIM",
    "temporal_delta_mae": "difference of frame-to-frame change (levels)",
    "motion_energy_ratio": "motion energy, candidate / reference",
    "first_frame_psnr": "PSNR of the first frame (dB)",
    "latent_relative_l2": "final latents, relative L2 error",
    "latent_cosine": "final latents, cosine",
    "latent_snr_db": "final latents, SNR (dB)",
}
ADHERENCE = ("colour", "shape", "direction")
HITS = tuple(f"{name}_hit" for name in ADHERENCE)
"""Share of units whose detected colour, shape or direction is the asked-for one; shown beside the soft scores."""
FIRST_FRAME = ("first_frame_to_image_psnr", "first_frame_copied")
"""Image-to-video only, per run: closeness of frame 0 to the input image (dB), and whether it is a copy of it."""
ANY = "any"
"""As a setting of a suite: whichever is given, as of the one noise that all videos start from."""
_UNBOUNDED = float("inf")
_RANGES: Mapping[str, tuple[float, float]] = {
    "motion_energy": (0.0, 255.0**2),
    "motion_energy_ratio": (0.0, _UNBOUNDED),
    "sharpness": (0.0, 2040.0**2),
    "frozen_frames": (0.0, _UNBOUNDED),
    "black_frames": (0.0, _UNBOUNDED),
    "identical_frames": (0.0, _UNBOUNDED),
    "psnr": (0.0, _UNBOUNDED),
    "ssim": (-1.0, 1.0),
    "temporal_delta_mae": (0.0, 510.0),
    "first_frame_psnr": (0.0, _UNBOUNDED),
    "first_frame_to_image_psnr": (0.0, _UNBOUNDED),
    "latent_relative_l2": (0.0, _UNBOUNDED),
    "latent_cosine": (-1.0 - 1e-9, 1.0 + 1e-9),
    "latent_snr_db": (-_UNBOUNDED, _UNBOUNDED),
    "overall_consistency": (-1.0, 1.0),
    "appearance_style": (-1.0, 1.0),
    "temporal_style": (-1.0, 1.0),
}
"""Values that a measure can have, where that is not 0 to 1; the last three are cosines of VBench."""
DRIFT_NOTE = "PSNR, SSIM and latent errors between two samples measure drift: sampling trajectories diverge even at FP8. They do not measure quality and never decide the verdict."


@dataclass(frozen=True)
class Mark:
    """published: 100 x the plain mean of the original's scores. share: of it that is asked for."""

    published: float
    share: float

    @property
    def needed(self) -> float:
        return round(self.published * self.share, 6)


@dataclass(frozen=True)
class Suite:
    """`gate`: dimensions whose losses are averaged (empty: no verdict). `beside`: dimensions of VBench that are scored too and
    stand beside the verdict. `vbench`: its Python package, "" for built-in suites.

    `mode` is VBench's: custom_input scores any videos with a prompt map; vbench_standard scores its own prompt list.
    `totals` maps group names to weights for VBench's published totals, `normalization` holds (min, max, weight, group),
    `prompts` how many prompts the full benchmark has in each dimension, with `videos_per_prompt` videos each. `settings`: of a
    run (names as in run.json) with which scores are comparable to others of this suite; `ANY`: one that is given. `mark`: a
    published score that the plain mean of the gate's dimensions has to reach a share of; no part of the verdict.
    """

    name: str
    gate: tuple[str, ...]
    vbench: str = ""
    mode: str = ""
    videos_per_prompt: int = 0
    totals: Mapping[str, float] | None = None
    normalization: Mapping[str, tuple[float, float, float, str]] | None = None
    prompts: Mapping[str, int] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    mark: Mark | None = None
    beside: tuple[str, ...] = ()

    @property
    def is_vbench(self) -> bool:
        return bool(self.vbench)

    @property
    def scored(self) -> tuple[str, ...]:
        """Every dimension that the suite takes scores of."""
        return (*self.gate, *self.beside)

    def narrowed(self, dimensions: Sequence[str] | None) -> Suite:
        """The same suite with only these dimensions (None: all); published totals are those of the whole gate.

        Raises:
            UsageError: not dimensions of this suite, or it is none of VBench's.
        """
        if not dimensions:
            return self
        unknown = [name for name in dimensions if name not in self.scored]
        if unknown or not self.is_vbench:
            raise UsageError(
                f"Suite {self.name} has no dimension {', '.join(unknown or dimensions)}; it has {', '.join(self.scored) or 'no gate dimensions'}."
            )
        gate, beside = (tuple(name for name in names if name in dimensions) for names in (self.gate, self.beside))
        if not gate:
            raise UsageError(
                f"{', '.join(beside)} stands beside the verdict of suite {self.name} and is no part of it. Name at least one of {', '.join(self.gate)} too."
            )
        if gate == self.gate:
            return replace(self, beside=beside)
        return replace(self, gate=gate, beside=beside, totals=None, mark=None)


def score_range(name: str, suite: Suite) -> tuple[float, float]:
    """Lowest and highest value of a measure in units.jsonl.

    Raises:
        UsageError: no measure of this package, and no dimension of the suite.
    """
    if name not in {*RUN_DIMENSIONS, *PAIRED_MEASURES, *ADHERENCE, *HITS, *FIRST_FRAME, *suite.scored}:
        raise UsageError(
            f"{name} is no measure of suite {suite.name}, whose dimensions are {', '.join(suite.gate) or 'none'}."
        )
    return _RANGES.get(name, (0.0, 1.0))


_BUILT_IN = {
    "core": Suite("core", ()),
    "tiny": Suite("tiny", (*ADHERENCE, "temporal_flickering")),
}


def suite_names() -> list[str]:
    """Names that `get_suite` knows."""
    folder = resources.files("ptq.evaluation") / "presets"
    return [*_BUILT_IN, *sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json"))]


def vbench_suites() -> str:
    """Names of the suites of VBench, for messages."""
    return ", ".join(name for name in suite_names() if name not in _BUILT_IN)


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the preset that the suite names, and its own."""
    named = named_settings(data["preset"]) if "preset" in data else {}
    named.pop(BOUNDARY, None)
    return named | data.get("settings", {})


def get_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        UsageError: unknown name; the text lists the known ones.
    """
    if name not in suite_names():
        raise UsageError(f"There is no suite {name!r}. Choose one of {', '.join(suite_names())}.")
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    data = json.loads((resources.files("ptq.evaluation") / "presets" / f"{name}.json").read_text(encoding="utf-8"))
    return Suite(
        name=name,
        gate=tuple(data["dimensions"]),
        vbench=data["package"],
        mode=data["mode"],
        videos_per_prompt=data.get("videos_per_prompt", 0),
        totals=data.get("totals"),
        prompts=data.get("prompts"),
        settings=_settings(data),
        mark=Mark(**data["mark"]) if "mark" in data else None,
        beside=tuple(data.get("beside", ())),
        normalization={key: tuple(value) for key, value in data["normalization"].items()}
        if "normalization" in data
        else None,
    )
