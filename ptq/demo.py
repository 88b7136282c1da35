"""The whole job on the embedded model: record, quantize, generate with both precisions, evaluate, report, package.

Calls the stages exactly as the commands do and leaves their directories behind, so every step can be looked at, rerun or
continued by hand. Nothing here computes anything of its own except the side-by-side videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptq import ui
from ptq.calibration.records import CalibrationSet
from ptq.calibration.run import CalibrationPlan, calibrate
from ptq.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from ptq.config import load_recipe
from ptq.evaluation import evaluate_runs
from ptq.generation import Settings, identify_model, run_generation
from ptq.generation.video import encode_video, write_video
from ptq.prompts import PromptSet, read_prompts
from ptq.quantization.run import quantize
from ptq.quantization.settings import QuantizeSettings
from ptq.report import Sources, render
from ptq.store.files import write_bytes
from ptq.submission.package import PASS, package
from ptq.tiny.grammar import calibration_prompts, held_out_prompts
from ptq.tiny.prompt_files import write_prompt_file
from ptq.wan.layout import ModelLayout
from ptq.wan.loading import load_pipeline, resolve_model

MODELS = ("tiny", "tiny-i2v")
CALIBRATION_PROMPTS = 16
SIDE_BY_SIDE = 6
SEPARATOR_PIXELS = 4
ZOOM = 4


@dataclass(frozen=True)
class DemoResult:
    """One format's outcome: manifest, evaluation.json's content, where everything is (`results`: report and submission)."""

    manifest: Manifest
    evaluation: dict[str, Any]
    checkpoint: Path
    videos: Path
    side_by_side: Path
    results: Path


class Demo:
    """The job in one directory; running it again continues or reuses what is there.

    Args:
        out: the directory.
        units: held-out prompts that are generated and judged.
        model: one of MODELS; tiny-i2v starts every video from a rendered first frame.
    """

    def __init__(self, out: Path, units: int, model: str = MODELS[0]) -> None:
        self.out, self.units, self.model = out, units, model
        self.layout: ModelLayout = resolve_model(model)
        self.from_image = self.layout.needs_image

    def run(self, formats: Sequence[str]) -> list[DemoResult]:
        """Record once, generate the original once, then quantize, generate and evaluate each format."""
        calibration_file = self._write_prompts("calibration", calibration_prompts(CALIBRATION_PROMPTS))
        held_out = read_prompts(self._write_prompts("held-out", held_out_prompts(self.units)))
        records = self._calibrate(read_prompts(calibration_file))
        checkpoints = {name: self._quantize(name, records) for name in formats}
        reference = self._generate("original", self.layout.path, held_out)
        return [self._judge(name, checkpoints[name], reference, held_out) for name in formats]

    def _write_prompts(self, name: str, prompts: Sequence[str]) -> Path:
        return write_prompt_file(self.out / "prompts", name, prompts, images=self.from_image)

    def _calibrate(self, prompts: PromptSet) -> CalibrationSet:
        ui.info(f"1. Recording denoiser inputs on {len(prompts.samples)} prompts")
        source = {"name": prompts.path.name, "sha256": prompts.sha256}
        plan = CalibrationPlan(self.layout, self.layout.preset, prompts.samples, 8, 0, source)
        calibrate(plan, lambda: load_pipeline(self.model), self.out / "calibration")
        return CalibrationSet(self.out / "calibration")

    def _quantize(self, name: str, records: CalibrationSet) -> Path:
        out = self.out / name
        if not (out / MANIFEST_FILE).exists():
            ui.info(f"2. Quantizing to {name}")
            recipe = load_recipe(name, name)
            settings = QuantizeSettings(name, recipe, name, {expert: {} for expert in self.layout.experts})
            quantize(self.layout, records, settings, out)
        return out

    def _generate(self, name: str, model: Path, prompts: PromptSet) -> Path:
        ui.info(f"3. Generating {len(prompts.samples)} videos: {name}")
        preset = self.layout.preset.model_dump(exclude={"variant", "hub_id"})
        out = self.out / "videos" / name
        source = {"file": str(prompts.path), "format": prompts.format, "sha256": prompts.sha256}
        run_generation(
            lambda: load_pipeline(model),
            prompts.samples,
            Settings(**preset, save_frames=True, image_to_video=self.from_image),
            out,
            model=identify_model(self.model if model == self.layout.path else str(model), model),
            prompts={**source, "samples": len(prompts.samples)},
        )
        return out

    def _judge(self, name: str, checkpoint: Path, reference: Path, prompts: PromptSet) -> DemoResult:
        candidate = self._generate(name, checkpoint, prompts)
        ui.info(f"4. Evaluating {name} against the original")
        evaluation = evaluate_runs(reference, candidate, self.out / "evaluation" / name, suite="tiny")
        side_by_side = self.out / "side-by-side" / name
        write_side_by_side(reference, candidate, side_by_side, self.layout.preset.fps)
        results = self._report(name, checkpoint, evaluation["verdict"])
        return DemoResult(read_manifest(checkpoint), evaluation, checkpoint, candidate, side_by_side, results)

    def _report(self, name: str, checkpoint: Path, verdict: str) -> Path:
        """Page, technical report and submission of one format; the submission of a gate that did not pass is marked."""
        ui.info(f"5. Writing the report and the submission of {name}")
        results, evaluation = self.out / "results" / name, self.out / "evaluation" / name
        _, page, document = render(Sources(evaluation, checkpoint))
        assert page is not None and document is not None  # both were asked for
        write_bytes(results / "report.html", page)
        write_bytes(results / "report.pdf", document)
        target = results / "submission.tar.gz"
        package(checkpoint, evaluation, target, pdf=document, html=page, allow_failing=verdict != PASS)
        return results


def write_side_by_side(reference: Path, candidate: Path, out: Path, fps: int, count: int = SIDE_BY_SIDE) -> list[Path]:
    """Write videos that show original (left) and quantized (right), enlarged; needs saved frames of both runs.

    Args:
        reference, candidate: generation directories.
        count: how many units, in file order.
    """
    written = []
    for path in sorted((reference / "frames").glob("*.npz"))[:count]:
        pair = [np.load(run / "frames" / path.name)["frames"] for run in (reference, candidate)]
        big = [frames.repeat(ZOOM, axis=1).repeat(ZOOM, axis=2) for frames in pair]
        gap = np.full((*big[0].shape[:2], SEPARATOR_PIXELS, 3), 255, dtype=np.uint8)
        frames = np.concatenate([big[0], gap, big[1]], axis=2)
        target = out / f"{path.stem}.mp4"
        write_video(target, encode_video(frames, fps), *frames.shape[:3])
        written.append(target)
    return written
