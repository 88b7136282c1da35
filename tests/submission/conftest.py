"""One small honest submission of the embedded model, made by the real stages, and a way to tamper with copies of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from once import made_once
from submission_helpers import Job, Tampered

from ptq.report import Report
from ptq.submission.package import package
from ptq.submission.unpack import extract_archive

REPORT = Report("the report", None, html=b"<html></html>", pdf=b"%PDF-1.7 report")
UNITS, STEPS = 4, 3


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Calibration, checkpoint (plain rounding, residual blocks), both runs of four prompts, evaluation by suite tiny."""
    return Job(made_once(tmp_path_factory, "submission", make_job))


def make_job(root: Path) -> None:
    from ptq import generation
    from ptq.calibration.prepare import make_plan, record_plan
    from ptq.cli.common import quiet_libraries
    from ptq.config import load_recipe
    from ptq.evaluation import evaluate_runs
    from ptq.prompts import read_prompts
    from ptq.quantization.job import Job as QuantizeJob
    from ptq.quantization.run import quantize
    from ptq.quantization.settings import QuantizeSettings
    from ptq.store.calibration import CalibrationSet
    from ptq.tiny.grammar import calibration_prompts, held_out_prompts, write_prompt_file
    from ptq.wan.loading import resolve_model

    root.mkdir()
    quiet_libraries()
    made, layout = Job(root), resolve_model("tiny")
    prompts = {
        name: write_prompt_file(made.root, name, texts, images=False)
        for name, texts in (("calibration-prompts", calibration_prompts(1)), ("held-out", held_out_prompts(UNITS)))
    }
    record_plan(make_plan(layout, read_prompts(prompts["calibration-prompts"])), made.root / "calibration")
    recipe = load_recipe("rtn", "hif4", ("solver.residual=0.05",))
    settings = QuantizeSettings("hif4", recipe, "rtn", {name: {} for name in layout.experts})
    quantize(QuantizeJob(layout, CalibrationSet(made.root / "calibration"), settings, made.checkpoint))
    samples, source = generation.read_samples(None, prompts["held-out"], from_image=False)
    for role, model in (("reference", "tiny"), ("candidate", str(made.checkpoint))):
        found = resolve_model(model)
        chosen = generation.resolve_settings(found, {"steps": STEPS}, save_frames=True, image_to_video=False)
        identity = generation.identify_model(model, found.path)
        generation.make_videos(found, samples, chosen, made.run(role), model=identity, prompts=source)
    evaluate_runs(made.run("reference"), made.run("candidate"), made.evaluation, suite="tiny", resamples=1000)


@pytest.fixture(scope="session")
def archive(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:

    def make(path: Path) -> None:
        package(job.checkpoint, job.evaluation, path, REPORT, allow_failing=True)

    return made_once(tmp_path_factory, "submission.tar.gz", make)


@pytest.fixture(scope="session")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:

    def make(root: Path) -> None:
        root.mkdir()
        extract_archive(archive, root, 10**9)

    return made_once(tmp_path_factory, "submission-unpacked", make)


@pytest.fixture
def tampered(unpacked: Path, tmp_path: Path) -> Tampered:
    def place(source: str, target: str) -> None:
        (os.link if os.path.getsize(source) > 100_000 else shutil.copyfile)(source, target)

    return Tampered(Path(shutil.copytree(unpacked, tmp_path / "tampered", copy_function=place)))
