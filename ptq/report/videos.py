"""Videos for the page: original, quantized and their amplified difference, as browsers play them (H.264, yuv420p); and
beside each other, for `ptq demo`.

Clips are chosen by rule, not by taste: units sorted by how far they drifted, taken at even distances from the most
drifted to the least. Video files go in byte for byte while they fit; where they are too large for one page, previews are
encoded and said to be such. The difference is always encoded here: |quantized - original| x AMPLIFY, black where equal.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ptq import ui
from ptq.evaluation.frames import VIDEO, frames_of
from ptq.evaluation.runs import Unit, verify_video
from ptq.generation.video import encode_stream, encode_video, write_video
from ptq.report.cells import plain
from ptq.report.facts import Facts
from ptq.store.evaluation_units import UnitLine

AMPLIFY = 8
PREVIEW_WIDTH = 416
BUDGET_BYTES = 10_000_000
"""Raw bytes of all videos of a page; base64 adds a third."""

_SIDE_BY_SIDE, _GAP_PIXELS, _ZOOM = 6, 4, 4
_CRF = "28"
"""Of what is encoded for the page."""
_DRIFT = (("ssim", "SSIM"), ("psnr", "PSNR"), ("latent_relative_l2", "latent error"))


@dataclass(frozen=True)
class Movie:
    """One playable video and a still of its middle frame. `role`: original, quantized or difference."""

    role: str
    mp4: bytes
    poster: bytes


@dataclass(frozen=True)
class Clip:
    """One unit's three movies. `preview`: the files themselves were too large; these are re-encoded and smaller."""

    unit: str
    prompt: str
    drift: str
    width: int
    height: int
    fps: int
    movies: tuple[Movie, ...]
    preview: bool


def make_clips(facts: Facts, limit: int) -> list[Clip]:
    """Up to `limit` clips of the evaluated units.

    Raises:
        DamagedFileError: a video is not the one that was generated.
    """
    chosen = choose_units(facts, limit)
    sizes = [sum(unit.video.stat().st_size for unit in pair) for pair, _ in chosen]
    # Differences are not made yet; they are smaller than the two videos, so half of the budget is theirs at most.
    preview = sum(sizes) > BUDGET_BYTES * 2 // 3
    if not chosen:
        return []
    clips: list[Clip] = []
    total = 0
    with ui.progress("Embedding videos", len(chosen)) as bar:
        for (reference, candidate), drift in chosen:
            clip = _clip(reference, candidate, drift, preview)
            total += sum(len(movie.mp4) for movie in clip.movies)
            bar.advance(note=clip.unit)
            if clips and total > BUDGET_BYTES:
                ui.info(
                    f"Only {len(clips)} of {len(chosen)} clips fit in {BUDGET_BYTES / 1e6:.0f} MB; the rest is left out."
                )
                return clips
            clips.append(clip)
    return clips


def choose_units(facts: Facts, limit: int) -> list[tuple[tuple[Unit, Unit], str]]:
    """Pairs at even ranks of drift, the most drifted first, with the drift in words."""
    by_name = {pair[0].name: pair for pair in facts.pairs}
    lines = [line for line in facts.units if line.unit in by_name]
    ranked = _ranked(lines)
    if len(ranked) > limit:
        ranked = [ranked[i] for i in np.linspace(0, len(ranked) - 1, limit).round().astype(int)]
    return [(by_name[line.unit], words) for line, words in ranked]


def _ranked(lines: list[UnitLine]) -> list[tuple[UnitLine, str]]:
    """Lines from the most drifted to the least, with the drift in words; by name where none was measured."""
    for key, name in _DRIFT:
        known = [(value, line) for line in lines if (value := line.paired.get(key)) is not None]
        if known and len(known) == len(lines):
            sign = -1 if key == "latent_relative_l2" else 1
            known.sort(key=lambda pair: (sign * pair[0], pair[1].unit))
            return [(line, f"{name} {plain(value, 3)}") for value, line in known]
    return [(line, "") for line in sorted(lines, key=lambda line: line.unit)]


def _clip(reference: Unit, candidate: Unit, drift: str, preview: bool) -> Clip:
    for unit in (reference, candidate):
        verify_video(unit)
    line = reference.line
    width, height, frames, fps = line.width or 0, line.height or 0, line.frames or 0, round(line.fps or 8)
    shown = _preview_size(width, height) if preview else (width, height)
    movies = []
    for role, unit in (("original", reference), ("quantized", candidate)):
        poster = _poster(frames_of(unit, VIDEO), frames, shown)
        data = unit.video.read_bytes() if not preview else encode_stream(frames_of(unit, VIDEO), fps, shown, crf=_CRF)
        movies.append(Movie(role, data, poster))
    data = encode_stream(difference(reference, candidate), fps, shown, crf=_CRF)
    movies.append(Movie("difference", data, _poster(difference(reference, candidate), frames, shown)))
    return Clip(reference.name, str(line.prompt), drift, width, height, fps, tuple(movies), preview)


def difference(reference: Unit, candidate: Unit) -> Iterator[np.ndarray]:
    """|quantized - original| x AMPLIFY of the two video files, uint8 [H, W, 3] frame by frame."""
    for ours, theirs in zip(frames_of(reference, VIDEO), frames_of(candidate, VIDEO), strict=True):
        gap = np.abs(theirs.astype(np.int16) - ours) * AMPLIFY
        yield np.minimum(gap, 255).astype(np.uint8)


def _preview_size(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, PREVIEW_WIDTH / width)
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _poster(frames: Iterator[np.ndarray], num_frames: int, size: tuple[int, int]) -> bytes:
    """The middle frame as JPEG."""
    from PIL import Image

    middle = next(frame for index, frame in enumerate(frames) if index == num_frames // 2)
    buffer = io.BytesIO()
    Image.fromarray(middle).resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_side_by_side(reference: Path, candidate: Path, out: Path, fps: int) -> None:
    """Write videos that show original (left) and quantized (right), enlarged; needs saved frames of both runs.

    Args:
        reference, candidate: generation directories; their first units in file order are shown.
    """
    for path in sorted((reference / "frames").glob("*.npz"))[:_SIDE_BY_SIDE]:
        pair = [np.load(run / "frames" / path.name)["frames"] for run in (reference, candidate)]
        big = [frames.repeat(_ZOOM, axis=1).repeat(_ZOOM, axis=2) for frames in pair]
        gap = np.full((*big[0].shape[:2], _GAP_PIXELS, 3), 255, dtype=np.uint8)
        frames = np.concatenate([big[0], gap, big[1]], axis=2)
        target = out / f"{path.stem}.mp4"
        write_video(target, encode_video(frames, fps), *frames.shape[:3])
