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

MODELS = ("tiny-outliers", "tiny", "tiny-i2v")
BASELINE = "rtn"
"""The recipe that the defaults are shown beside: plain rounding, in the first format."""
CALIBRATION_PROMPTS = 16
PICTURE = "picture.png"
"""Name of the picture in the demo's directory."""


@dataclass(frozen=True)
class DemoResult:
    """One recipe's outcome, and where everything is (`results`: report and submission; None for the baseline)."""

    name: str
    manifest: Manifest
    evaluation: Evaluation
    checkpoint: Path
    results: Path | None


class DemoJob:
    """The job in one directory; running it again continues or reuses what is there.

    Args:
        out: the directory.
        units: held-out prompts that are generated and judged.
        model: one of MODELS; tiny-outliers has the channel outliers of large models, tiny-i2v starts from rendered frames.
    """

    def __init__(self, out: Path, units: int, model: str = MODELS[0]) -> None:
        from ptq.wan.loading import resolve_model

        self.out, self.units, self.model = out, units, model
        self.layout = resolve_model(model)
        self.from_image = self.layout.needs_image

    def run(self, formats: Sequence[str]) -> list[DemoResult]:
        """Record once, generate the original once, then quantize, generate and evaluate: plain rounding, then each format."""
        from ptq.tiny.grammar import calibration_prompts, held_out_prompts

        calibration_file = self._write_prompts("calibration", calibration_prompts(CALIBRATION_PROMPTS))
        held_out = self._write_prompts("held-out", held_out_prompts(self.units))
        records = self._calibrate(calibration_file)
        recipes = {BASELINE: formats[0]} | {name: name for name in formats}
        checkpoints = {recipe: self._quantize(recipe, name, records) for recipe, name in recipes.items()}
        reference = self._generate("original", self.model, held_out)
        results = [self._judge(recipe, checkpoints[recipe], reference, held_out) for recipe in recipes]
        self._draw(reference, results)
        return results

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

    def _quantize(self, recipe_name: str, format_name: str, records: CalibrationSet) -> Path:
        from ptq.checkpoint.manifest import MANIFEST_FILE
        from ptq.config import load_recipe
        from ptq.quantization.job import Job
        from ptq.quantization.run import quantize
        from ptq.quantization.settings import QuantizeSettings

        out = self.out / recipe_name
        if not (out / MANIFEST_FILE).exists():
            ui.info(f"2. Quantizing to {format_name}, recipe {recipe_name}")
            recipe = load_recipe(recipe_name, format_name)
            blocks: dict[str, dict[int, str]] = {expert: {} for expert in self.layout.experts}
            settings = QuantizeSettings(format_name, recipe, recipe_name, blocks)
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
        results = None if name == BASELINE else self._report(name, checkpoint, evaluation.verdict)
        return DemoResult(name, read_manifest(checkpoint), evaluation, checkpoint, results)

    def _draw(self, reference: Path, results: Sequence[DemoResult]) -> None:
        """The original's frames above those of every recipe, with its verdict."""
        from ptq.report.picture import write_picture

        runs = {"original": reference}
        for one in results:
            loss = one.evaluation.deciding
            what = f"{one.manifest.format}, {'plain rounding' if one.name == BASELINE else 'default recipe'}"
            said = f"{one.evaluation.verdict}" + ("" if loss is None else f", loss {loss.value:.2%}")
            runs[f"{what}\n{said}"] = self.out / "videos" / one.name
        write_picture(runs, self.out / PICTURE)

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
