"""Measure every pair of units and keep the results as lines of units.jsonl, so that a stopped evaluation resumes.

Each line carries a digest of what it was measured from (the digests of both videos, saved frames and latents; stride, suite)
and one of its own values. A line is reused only when both are the same and the files still have those digests. What it will take is estimated here too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptq import ui
from ptq.errors import DamagedFileError, PtqError
from ptq.evaluation import measures
from ptq.evaluation.frames import SAVED, VIDEO, choose_source, first_frame_measures, frames_of, input_image
from ptq.evaluation.overlap import check_overlap
from ptq.evaluation.runs import Unit, pair_runs, read_run
from ptq.evaluation.streaming import measure_clips
from ptq.evaluation.suites import ADHERENCE, FIRST_FRAME, HITS, RUN_DIMENSIONS, Suite
from ptq.store.evaluation import ROLES
from ptq.store.evaluation_units import Hashes, UnitLine, append_unit, read_units, write_units
from ptq.store.files import digest
from ptq.store.run_manifest import FILE_KEYS

MEASURE_VERSION = 2
"""Raise it when a measure or what a line is bound to changes: results kept by an older version are then measured again."""
SECONDS_PER_MEGAPIXEL = 0.25
"""Core-seconds for one million pixels of a frame pair, all measures (61 frames of 720p take 11.5, two thirds in SSIM)."""
_BYTES_PER_PIXEL, _BASE_BYTES, _BYTES_PER_LINE = 60, 150e6, 2500
FILM_SQUARE = 4
"""Pixels; over fewer, the halved colour of a video is a larger difference than another picture."""


def plan(reference: Path, candidate: Path, *, allow_overlap: bool = False, **pairing_options: Any) -> dict[str, Any]:
    """Units that would be measured and an estimate: {units, excluded, seconds, memory_bytes, disk_bytes}; options as `pair_runs`.

    Raises:
        PtqError: as `evaluate_runs` would, for unpaired or incomplete runs, and for prompts seen in calibration.
    """
    runs = read_run(reference), read_run(candidate)
    pairing = pair_runs(*runs, **pairing_options)
    check_overlap(runs[1], (unit.name for _, unit in pairing.pairs), allow=allow_overlap)
    lines = [unit.line for unit, _ in pairing.pairs]
    pixels = [(line.width or 0) * (line.height or 0) for line in lines]
    pixels_of_all = sum(size * (line.frames or 0) for size, line in zip(pixels, lines, strict=True))
    cores = min(4, len(os.sched_getaffinity(0)))
    return {
        "units": len(pairing.pairs),
        "excluded": len(pairing.excluded),
        "seconds": pixels_of_all / 1e6 * SECONDS_PER_MEGAPIXEL / cores,
        "memory_bytes": _BASE_BYTES + _BYTES_PER_PIXEL * max(pixels),
        "disk_bytes": float(_BYTES_PER_LINE * len(pairing.pairs)),
    }


def measure_units(pairs: Sequence[tuple[Unit, Unit]], out: Path, suite: Suite, *, stride: int) -> list[UnitLine]:
    """Measure all pairs; results already in `out` are reused. Returns the lines of units.jsonl, in order.

    Raises:
        DamagedFileError: a file is not the one that the manifest recorded, or cannot be read; names it.
    """
    known = {line.inputs: line for line in map(_measured_only, read_units(out, skip_damaged=True)) if _is_own(line)}
    lines = []
    with ui.progress("Measuring videos", len(pairs)) as bar:
        for reference, candidate in pairs:
            inputs = inputs_digest(reference, candidate, suite, stride)
            line = known.get(inputs)
            if line is None:
                line = measure_unit(reference, candidate, suite, stride, inputs)
                append_unit(out, line)
            else:
                for unit in (reference, candidate):
                    unit.check(*FILE_KEYS)
            lines.append(line)
            bar.advance(note=reference.name)
    write_units(out, lines)
    return lines


def _measured_only(line: UnitLine) -> UnitLine:
    """A kept line without the scores that another suite merged into it."""
    own = {*RUN_DIMENSIONS, *ADHERENCE, *HITS, *FIRST_FRAME}
    values = {
        role: {name: value for name, value in line.of(role).items() if name in own} | line.replaced.get(role, {})
        for role in ROLES
    }
    kept = {name: getattr(line, name) for name in line.model_fields_set - {"replaced"}}
    return UnitLine(**kept | values)


def _is_own(line: UnitLine) -> bool:
    """Whether a kept line still says what was measured."""
    return line.measured is not None and line.measured == _digest_of_values(line)


def _digest_of_values(line: UnitLine) -> str:
    return digest(line.model_dump(mode="json", exclude={"measured", "replaced"}))


def inputs_digest(reference: Unit, candidate: Unit, suite: Suite, stride: int) -> str:
    """Digest of what a line of units.jsonl is measured on, and how: the files of both runs by their manifests."""

    def artifacts(unit: Unit) -> list[Any]:
        digests = [getattr(unit.line, f"{key}_sha256") for key in FILE_KEYS]
        return [digests, unit.score_prompt, unit.line.image_sha256]

    scored = suite.name if suite.name == "tiny" else "core"
    return digest([MEASURE_VERSION, scored, stride, artifacts(reference), artifacts(candidate), reference.name])


def is_measured_on(line: UnitLine, reference: Unit, candidate: Unit, suite: Suite, stride: int) -> bool:
    """Whether a line was measured on the files that both runs have now, in this way, and nothing of it was changed since."""
    return line.inputs == inputs_digest(reference, candidate, suite, stride) and _is_own(_measured_only(line))


def measure_unit(reference: Unit, candidate: Unit, suite: Suite, stride: int, inputs: str) -> UnitLine:
    """All measures of one pair; missing values are None."""
    source = choose_source(reference, candidate)
    if source == SAVED:  # nothing else here reads the videos, but VBench and the report do
        for unit in (reference, candidate):
            unit.check("video")
    clips = measure_clips(
        frames_of(reference, source), frames_of(candidate, source), stride=stride, name=f"unit {reference.name}"
    )
    values: dict[str, Any] = {"reference": clips.reference, "candidate": clips.candidate, "paired": clips.paired}
    values["paired"].update(_latents(reference, candidate))
    if reference.line.image:
        mse, _ = measures.mean_square_and_abs(clips.first_frames[1].astype(np.int16) - clips.first_frames[0])
        values["paired"]["first_frame_psnr"] = measures.psnr_from_mse(mse) if mse > 0 else None
        image = input_image(reference, *clips.first_frames[0].shape[:2])
        if image is not None:
            values["reference"].update(first_frame_measures(clips.first_frames[0], image, source))
            values["candidate"].update(first_frame_measures(clips.first_frames[1], image, source))
    if suite.name == "tiny":
        for role, unit in (("reference", reference), ("candidate", candidate)):
            values[role].update(_adherence(unit, source))
    hashes = Hashes(reference=clips.hashes[0], candidate=clips.hashes[1])
    line = UnitLine(unit=reference.name, inputs=inputs, source=source, **values, hashes=hashes)
    return line.model_copy(update={"measured": _digest_of_values(line)})


def film_psnr(unit: Unit) -> float | None:
    """PSNR (dB) of the video against the saved frames that it was made of, both averaged over squares of `FILM_SQUARE` pixels.

    None where they are equal, or no frames were saved.
    """
    if not unit.keeps("saved_frames"):
        return None
    pairs = zip(frames_of(unit, VIDEO), frames_of(unit, SAVED), strict=True)
    mse = np.mean([np.square(_coarse(ours) - _coarse(theirs)).mean() for ours, theirs in pairs])
    return measures.psnr_from_mse(float(mse)) if mse > 0 else None


def _coarse(frame: np.ndarray) -> np.ndarray:
    height, width = (size // FILM_SQUARE * FILM_SQUARE for size in frame.shape[:2])
    squares = frame[:height, :width].reshape(height // FILM_SQUARE, FILM_SQUARE, width // FILM_SQUARE, FILM_SQUARE, 3)
    return squares.mean((1, 3))


def _adherence(unit: Unit, source: str) -> dict[str, float]:
    from ptq.tiny.detect import adherence
    from ptq.tiny.grammar import parse_prompt

    try:
        scene = parse_prompt(unit.score_prompt)
    except ValueError as error:
        raise PtqError(
            f"Unit {unit.name} is not from the tiny world, which --suite tiny scores ({error}). Use --suite core or a VBench suite for these videos."
        ) from error
    return adherence(np.stack(list(frames_of(unit, source))), scene)


def _latents(reference: Unit, candidate: Unit) -> dict[str, float | None]:
    if not (reference.keeps("final_latents") and candidate.keeps("final_latents")):
        return {}
    try:
        return measures.latent_error(_read_latents(reference), _read_latents(candidate))
    except ValueError as error:
        raise DamagedFileError(f"The final latents of unit {reference.name} cannot be compared: {error}.") from error


def _read_latents(unit: Unit) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    with unit.open("final_latents") as file:
        data = file.read()
    try:
        return load(data)["latents"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f'{unit.directory / str(unit.line.final_latents)} cannot be read as safetensors with a tensor "latents" ({error}).'
        ) from error
