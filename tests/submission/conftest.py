"""One small honest submission of the embedded model, made by the real stages, and a way to tamper with copies of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from once import made_once

from ptq.report import Report
from ptq.store.files import read_json, write_bytes, write_json
from ptq.submission.contents import CHECKSUMS, Contents
from ptq.submission.package import package
from ptq.submission.unpack import extract_archive
from ptq.submission.verify import check_contents

REPORT = Report("the report", None, html=b"<html></html>", pdf=b"%PDF-1.7 report")
UNITS, STEPS = 4, 3


@dataclass(frozen=True)
class Job:
    """Directories of the stages."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "hif4"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    def run(self, role: str) -> Path:
        return self.root / role


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


class Tampered:
    """A copy of the honest submission that a test changes; large files are links, so they are replaced, not edited."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> Any:
        return read_json(self.root / name)

    def edit(self, name: str, change: Callable[[Any], object]) -> None:
        """Change a JSON file in place."""
        value = self.read(name)
        change(value)
        (self.root / name).unlink()
        (self.root / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def edit_lines(self, name: str, change: Callable[[list[Any]], object]) -> None:
        """Change the list of values of a JSONL file in place."""
        values = [json.loads(line) for line in (self.root / name).read_text().splitlines()]
        change(values)
        self.write(name, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode())

    def write(self, name: str, data: bytes) -> None:
        """Replace a file; units.jsonl with the digest that evaluation.json has of it, as a forger would."""
        write_bytes(self.root / name, data)
        if name == "evaluation/units.jsonl":
            digest = hashlib.sha256(data).hexdigest()
            self.edit("evaluation/evaluation.json", lambda judged: judged.update(units_sha256=digest))

    def redo_manifest(self) -> None:
        """Digests of the checkpoint's files, as a forger would write them."""
        from ptq.checkpoint.manifest import MANIFEST_FILE, hash_files

        weights = self.root / "weights"
        manifest = read_json(weights / MANIFEST_FILE)
        manifest["files"] = hash_files(weights)
        write_json(weights / MANIFEST_FILE, manifest)

    def redo_derived(self) -> None:
        """Recipe, prompts, README, script and claims, derived from what the files say now."""
        from ptq.submission.derive import derive

        contents = self.contents()
        lines = {name: line for name, line in contents.lines["candidate"].items() if line.is_done}
        parts = (contents.manifest, contents.evaluation, contents.calibration, contents.infos, lines)
        for name, data in derive(contents.weights, *parts).items():
            self.write(name, data)

    def redo_evaluation(self, **judgement: Any) -> None:
        """evaluation.json from the units that are there now, over the dimensions that it names."""
        from ptq.evaluation import statistics
        from ptq.evaluation.scores import scores_from_units
        from ptq.store.evaluation import FILE, read_evaluation
        from ptq.store.evaluation_units import read_units

        directory = self.root / "evaluation"
        judged = read_evaluation(directory)
        lines = read_units(directory)
        scores = scores_from_units(lines, judged.dimensions)
        again = scores.compare(scores.reference, resamples=1000, seed=judged.bootstrap.seed)
        verdict = statistics.verdict(again.aggregates["mean_signed"], judged.limit or 0)
        parts = {
            "dimensions": again.dimensions,
            "aggregates": again.aggregates,
            "verdict": verdict,
            "units": len(lines),
        }
        write_json(directory / FILE, judged.model_copy(update={**parts, **judgement}).as_json())

    def redo_checksums(self) -> None:
        names = [name for name in self.names() if name != CHECKSUMS]
        lines = [f"{hashlib.sha256((self.root / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        self.write(CHECKSUMS, "".join(lines).encode())

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def contents(self) -> Contents:
        return Contents(self.root, self.names())

    def problems(self, *, regenerate: bool = False) -> dict[str, str]:
        """Claims that do not hold -> why, after the checksums were made to fit."""
        self.redo_checksums()
        claims = check_contents(self.contents(), regenerate=regenerate)
        return {claim.name: claim.found for claim in claims if claim.holds is False}


@pytest.fixture
def tampered(unpacked: Path, tmp_path: Path) -> Tampered:
    def place(source: str, target: str) -> None:
        (os.link if os.path.getsize(source) > 100_000 else shutil.copyfile)(source, target)

    return Tampered(Path(shutil.copytree(unpacked, tmp_path / "tampered", copy_function=place)))
