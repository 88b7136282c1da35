"""One whole job for the report tests: a packed checkpoint from the real stages, two paired runs, an evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from once import made_once
from report_helpers import SENSITIVITY, SETTINGS, UNITS, Job, make_run, page_of, tiny_clips


@pytest.fixture(scope="session")
def job(packed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Read-only; `copy_job` makes one that a test may change."""
    return Job(made_once(tmp_path_factory, "demo", lambda root: make_job(root, packed)))


def make_job(root: Path, packed: dict[str, Path]) -> None:
    from ptq.evaluation import evaluate_runs
    from ptq.generation import identify_model

    job = Job(root)
    shutil.copytree(packed["hif4"], job.checkpoint)
    (job.checkpoint / "ptq_sensitivity.json").write_text(json.dumps(SENSITIVITY))
    (job.root / "calibration").mkdir()
    shutil.copy(packed["hif4"].parent / "hif4-records" / "calibration.json", job.root / "calibration")
    clips, prompts = tiny_clips(UNITS)
    generator = np.random.default_rng(0)
    worse = {
        name: np.clip(frames + generator.normal(0, 1 + index / 4, frames.shape), 0, 255).astype(np.uint8)
        for index, (name, frames) in enumerate(clips.items())
    }
    plan = {"units": UNITS, "samples_per_prompt": 1, "shards": 1}
    plan["prompts"] = {"file": "held-out.txt", "format": "txt", "sha256": "0" * 64, "samples": UNITS}
    common = {"settings": SETTINGS, "versions": {"ptq": "0.1.0", "torch": "2.13.0"}, "plan": plan}
    checkpoint = {"digest": identify_model("hif4", job.checkpoint).digest, "format": "hif4"}
    make_run(job.run("reference"), clips, prompts=prompts, info={**common, "model": "tiny"})
    make_run(job.run("candidate"), worse, prompts=prompts, info={**common, "model": "hif4", "checkpoint": checkpoint})
    evaluate_runs(job.run("reference"), job.run("candidate"), job.evaluation, suite="tiny", resamples=1000)


@pytest.fixture
def copy_job(job: Job, tmp_path: Path) -> Job:
    """A copy whose evaluation names the copied runs."""
    copy = Job(Path(shutil.copytree(job.root, tmp_path / "copy")))

    def move(content: dict) -> None:
        for role in ("reference", "candidate"):
            content[role]["directory"] = str(copy.run(role))

    copy.edit(move)
    return copy


@pytest.fixture(scope="session")
def page(job: Job) -> str:
    return page_of(job.evaluation, job.checkpoint)
