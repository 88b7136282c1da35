"""Measure every pair of units and keep the results as lines of units.jsonl, so that a stopped evaluation resumes.

Each line carries a digest of what it was measured from (both videos, saved frames, latents, stride, suite); a line is
reused only when that digest is the same. `finish` rewrites the file with exactly the evaluated units, in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ptq import ui
from ptq.errors import DamagedFileError, PtqError
from ptq.evaluation import measures
from ptq.evaluation.frames import choose_source, first_frame_measures, frames_of, input_image
from ptq.evaluation.runs import Unit, verify_video
from ptq.evaluation.streaming import measure_clips
from ptq.evaluation.suites import ADHERENCE, FIRST_FRAME, HITS, RUN_DIMENSIONS, Suite
from ptq.store.files import append_jsonl, digest, read_jsonl, write_bytes

#: Raise it when a measure changes its meaning: results kept by an older version are then measured again.
MEASURE_VERSION = 1
FILE_NAME = "units.jsonl"


def measure_units(
    pairs: list[tuple[Unit, Unit]], out: Path, suite: Suite, *, stride: int, fresh: bool = False
) -> list[dict[str, Any]]:
    """Measure all pairs; results already in `out` are reused unless `fresh`. Returns the lines of units.jsonl, in
    order.
    """
    path = out / FILE_NAME
    known = {} if fresh else {line.get("inputs"): _measured_only(line) for line in read_jsonl(path, skip_damaged=True)}
    if fresh:
        path.unlink(missing_ok=True)
    lines = []
    with ui.progress("Measuring videos", len(pairs)) as bar:
        for reference, candidate in pairs:
            inputs = _inputs_digest(reference, candidate, suite, stride)
            line = known.get(inputs)
            if line is None:
                line = {"unit": reference.name, "inputs": inputs, **measure_unit(reference, candidate, suite, stride)}
                append_jsonl(path, line)
            lines.append(line)
            bar.advance(note=reference.name)
    finish(path, lines)
    return lines


def _measured_only(line: dict[str, Any]) -> dict[str, Any]:
    """A kept line without the scores that another suite merged into it."""
    own = {*RUN_DIMENSIONS, *ADHERENCE, *HITS, *FIRST_FRAME}
    values = {
        role: {name: value for name, value in line.get(role, {}).items() if name in own}
        for role in ("reference", "candidate")
    }
    return {**line, **values}


def finish(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Rewrite units.jsonl atomically with these lines only."""
    write_bytes(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode())


def _inputs_digest(reference: Unit, candidate: Unit, suite: Suite, stride: int) -> str:
    def artifacts(unit: Unit) -> list[Any]:
        verify_video(unit)
        kept = [unit.optional_file(key) for key in ("saved_frames", "final_latents")]
        sizes = [[path.stat().st_size, path.stat().st_mtime_ns] if path else None for path in kept]
        return [unit.record["video_sha256"], sizes, unit.score_prompt, unit.record.get("image_sha256")]

    scored = suite.name if suite.name == "tiny" else "core"
    return digest([MEASURE_VERSION, scored, stride, artifacts(reference), artifacts(candidate), reference.name])


def measure_unit(reference: Unit, candidate: Unit, suite: Suite, stride: int) -> dict[str, Any]:
    """All measures of one pair: {source, reference, candidate, paired, hashes}; missing values are None."""
    source = choose_source(reference, candidate)
    clips = measure_clips(
        frames_of(reference, source), frames_of(candidate, source), stride=stride, name=f"unit {reference.name}"
    )
    values = {"reference": clips.reference, "candidate": clips.candidate, "paired": clips.paired}
    values["paired"].update(_latents(reference, candidate))
    if reference.record.get("image"):
        mse, _ = measures.mean_square_and_abs(clips.first_frames[1].astype(np.int16) - clips.first_frames[0])
        values["paired"]["first_frame_psnr"] = measures.psnr_from_mse(mse) if mse > 0 else None
        image = input_image(reference, *clips.first_frames[0].shape[:2])
        if image is not None:
            values["reference"].update(first_frame_measures(clips.first_frames[0], image, source))
            values["candidate"].update(first_frame_measures(clips.first_frames[1], image, source))
    if suite.name == "tiny":
        for role, unit in (("reference", reference), ("candidate", candidate)):
            values[role].update(_adherence(unit, source))
    return {"source": source, **values, "hashes": {"reference": clips.hashes[0], "candidate": clips.hashes[1]}}


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
    paths = [unit.optional_file("final_latents") for unit in (reference, candidate)]
    if paths[0] is None or paths[1] is None:
        return {}
    try:
        return measures.latent_error(_read_latents(paths[0]), _read_latents(paths[1]))
    except ValueError as error:
        raise DamagedFileError(f"The final latents of unit {reference.name} cannot be compared: {error}.") from error


def _read_latents(path: Path) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)["latents"]
    except (SafetensorError, KeyError, OSError) as error:
        raise DamagedFileError(f'{path} cannot be read as safetensors with a tensor "latents" ({error}).') from error
