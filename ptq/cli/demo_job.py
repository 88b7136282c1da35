"""The job of `ptq demo` on an embedded model: record, quantize, generate with both precisions, evaluate, report, package.

Calls the stages exactly as the commands do and leaves their directories behind, so every step can be looked at, rerun or
continued by hand. Nothing is computed here; each method is one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptq import ui

if TYPE_CHECKING:
    from ptq.checkpoint.manifest import Manifest
    from ptq.store.calibration import CalibrationSet
    from ptq.store.evaluation import Evaluation

MODELS = ("tiny", "tiny-i2v")
CALIBRATION_PROMPTS = 16


@dataclass(frozen=True)
class DemoResult:
    """One format's outcome, and where everything is (`results`: report and submission)."""

    manifest: Manifest
    evaluation: Evaluation
    checkpoint: Path
    results: Path


class DemoJob:
    """The job in one directory; running it again continues or reuses what is there.

    Args:
        out: the directory.
        units: held-out prompts that are generated and judged.
        model: one of MODELS; tiny-i2v starts every video from a rendered first frame.
    """

    def __init__(self, out: Path, units: int, model: str = MODELS[0]) -> None:
        from ptq.wan.loading import resolve_model

        self.out, self.units, self.model = out, units, model
        self.layout = resolve_model(model)
        self.from_image = self.layout.needs_image

    def run(self, formats: Sequence[str]) -> list[DemoResult]:
        """Record once, generate the original once, then quantize, generate and evaluate each format."""
        from ptq.tiny.grammar import calibration_prompts, held_out_prompts

        calibration_file = self._write_prompts("calibration", calibration_prompts(CALIBRATION_PROMPTS))
        held_out = self._write_prompts("held-out", held_out_prompts(self.units))
        records = self._calibrate(calibration_file)
        checkpoints = {name: self._quantize(name, records) for name in formats}
        reference = self._generate("original", self.model, held_out)
        return [self._judge(name, checkpoints[name], reference, held_out) for name in formats]

    def _write_prompts(self, name: str, prompts: Sequence[str]) -> Path:
        from ptq.tiny.grammar import write_prompt_file

        return write_prompt_file(self.out / "prompts", name, prompts, images=self.from_image)

    def _calibrate(self, prompts: Path) -> CalibrationSet:
        from ptq.calibration.prepare import make_plan, record_plan
        from ptq.prompts import read_prompts
        from ptq.store.calibration import CalibrationSet

        plan = make_plan(self.layout, read_prompts(prompts))
        ui.info(f"1. Recording denoiser inputs on {len(plan.samples)} prompts")
        record_plan(plan, self.out / "calibration")
        return CalibrationSet(self.out / "calibration")

    def _quantize(self, name: str, records: CalibrationSet) -> Path:
        from ptq.checkpoint.manifest import MANIFEST_FILE
        from ptq.config import load_recipe
        from ptq.quantization.job import Job
        from ptq.quantization.run import quantize
        from ptq.quantization.settings import QuantizeSettings

        out = self.out / name
        if not (out / MANIFEST_FILE).exists():
            ui.info(f"2. Quantizing to {name}")
            recipe = load_recipe(name, name)
            settings = QuantizeSettings(name, recipe, name, {expert: {} for expert in self.layout.experts})
            quantize(Job(self.layout, records, settings, out))
        return out

    def _generate(self, name: str, model: str, prompts: Path) -> Path:
        from ptq import generation
        from ptq.wan.loading import resolve_model

        samples, source = generation.read_samples(None, prompts, from_image=self.from_image)
        ui.info(f"3. Generating {len(samples)} videos: {name}")
        layout, out = resolve_model(model), self.out / "videos" / name
        settings = generation.resolve_settings(layout, save_frames=True, image_to_video=self.from_image)
        identity = generation.identify_model(model, layout.path)
        generation.make_videos(layout, samples, settings, out, model=identity, prompts=source)
        return out

    def _judge(self, name: str, checkpoint: Path, reference: Path, prompts: Path) -> DemoResult:
        from ptq.checkpoint.manifest import read_manifest
        from ptq.evaluation import evaluate_runs
        from ptq.report.videos import write_side_by_side

        candidate = self._generate(name, str(checkpoint), prompts)
        ui.info(f"4. Evaluating {name} against the original")
        evaluation = evaluate_runs(reference, candidate, self.out / "evaluation" / name, suite="tiny")
        write_side_by_side(reference, candidate, self.out / "side-by-side" / name, self.layout.preset.fps)
        results = self._report(name, checkpoint, evaluation.verdict)
        return DemoResult(read_manifest(checkpoint), evaluation, checkpoint, results)

    def _report(self, name: str, checkpoint: Path, verdict: str | None) -> Path:
        """Page, technical report and submission of one format; the submission of a gate that did not pass is marked."""
        from ptq.report import Sources, render
        from ptq.store.evaluation import PASS
        from ptq.store.files import write_bytes
        from ptq.submission.package import package

        ui.info(f"5. Writing the report and the submission of {name}")
        results, evaluation = self.out / "results" / name, self.out / "evaluation" / name
        report = render(Sources(evaluation, checkpoint))
        write_bytes(results / "report.html", report.html)
        write_bytes(results / "report.pdf", report.pdf)
        target = results / "submission.tar.gz"
        package(checkpoint, evaluation, target, report, allow_failing=verdict != PASS)
        return results
