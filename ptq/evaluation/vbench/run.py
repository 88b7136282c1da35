"""Run VBench under a foreign interpreter, one process a dimension and run, and collect the rows.

VBench pins packages that cannot live beside ours, so it is never imported. Each dimension gets a staging folder of links
that holds nothing but its videos, a job file, a log, and a result that is kept under the digest of its inputs: a stopped
or failed evaluation continues with the missing dimensions. Nothing is downloaded: missing weights are listed first.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ptq import ui
from ptq.errors import PtqError
from ptq.evaluation.runs import Unit
from ptq.evaluation.scores import Scores
from ptq.evaluation.suites import Suite
from ptq.evaluation.vbench.check import DRIVER, Installation, foreign_environment, missing_weights, probe
from ptq.evaluation.vbench.results import PARTIAL, DimensionRows, parse_results, scores_from_tables, standard_name
from ptq.store.ending import run_child
from ptq.store.files import digest, read_json, write_json
from ptq.store.schema import Schema, parse

DRIVER_VERSION = "fdd4f06e4161b6784beb3d5a54bb3999c6390b2ede0f23b23c2a70e12b20102b"
"""Part of the digest under which results are kept; another value where the driver scores otherwise. It is the sha256 of the
first driver, so that what an earlier version has kept is not computed again."""

_FULL_INFO = {"vbench": "VBench_full_info.json", "vbench2_beta_i2v": "vbench2_i2v_full_info.json"}
_RESOLUTIONS = {"1-1": 1.0, "8-5": 1.6, "7-4": 1.75, "16-9": 16 / 9}
_LOG_LINES = 8
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class VBenchSettings:
    """Where VBench lives: its interpreter, an optional checkout, and the device to score on."""

    python: Path
    root: Path | None = None
    device: str = "cuda"


class _Benchmarked(BaseModel):
    """A prompt of the benchmark and the dimensions it is scored in; other keys are VBench's."""

    prompt_en: str
    dimension: list[str]


class FullInfo(Schema):
    """VBench's list of its prompts."""

    entries: list[_Benchmarked]


class KeptResult(Schema):
    """`result.json` of a dimension: what VBench wrote, under the digest of what it was made from, and its own digest.

    results_digest: absent in earlier versions, whose results are computed again.
    """

    inputs: str
    results: Any
    results_digest: str | None = None


@dataclass(frozen=True)
class _Job:
    """One dimension of one run: the units to score and the file name each gets in the staging folder."""

    dimension: str
    units: dict[str, Unit]
    folder: Path


def check_vbench(suite: Suite, settings: VBenchSettings) -> Installation:
    """Find VBench and its weights.

    Raises:
        UsageError: no such interpreter, or VBench is not there. PtqError: weights are missing.
    """
    installation = probe(settings.python, settings.root)
    _check_weights(suite, installation)
    return installation


def run_vbench(
    pairs: Sequence[tuple[Unit, Unit]],
    suite: Suite,
    settings: VBenchSettings,
    folder: Path,
    *,
    allow_missing: bool,
    fresh: bool = False,
    roles: tuple[str, str] = ("reference", "candidate"),
) -> Scores:
    """Score every dimension of the suite, those beside its verdict among them, for both runs.

    Args:
        folder: where staging folders, logs and results go; results found there for the same inputs are reused.
        roles: what the two of a pair are called, and their folders.

    Raises:
        UsageError: no such interpreter, or VBench is not there. PtqError: weights are missing, or dimensions failed;
        those that succeeded are kept.
    """
    installation = check_vbench(suite, settings)
    if fresh and folder.exists():
        shutil.rmtree(folder)
    members = _members(pairs, suite, installation)
    tables: list[dict[str, DimensionRows]] = [{}, {}]
    failures = []
    with ui.progress("VBench", 2 * len(suite.scored)) as bar:
        for side, role in enumerate(roles):
            for dimension in suite.scored:
                units = {_staged_name(pair[side], suite): pair[side] for pair in members[dimension]}
                job = _Job(dimension, units, folder / role / dimension)
                try:
                    tables[side][dimension] = _score(job, suite, settings, installation)
                except PtqError as error:
                    failures.append(f"{dimension} of the {role}: {error}")
                bar.advance(note=f"{role} {dimension}")
    if failures:
        raise PtqError(
            f"VBench failed for {len(failures)} of {2 * len(suite.scored)} dimensions; the others are kept in {folder} and are not computed again. {' '.join(failures)}"
        )
    expected = {name: {ours.name for ours, _ in members[name]} for name in suite.scored}
    details = {"installation": installation.describe(), "mode": suite.mode}
    return scores_from_tables(
        tables[0], tables[1], suite, pairs, allow_missing=allow_missing, details=details, expected=expected
    )


def _check_weights(suite: Suite, installation: Installation) -> None:
    missing = missing_weights(suite.scored, installation.cache)
    if missing:
        listed = "; ".join(f"{weight.path} (from {weight.source})" for weight in missing)
        raise PtqError(
            f"VBench needs files that are not there, and nothing is downloaded silently: {listed}. Put them in place (`ptq evaluate --vbench-check` shows the list), or choose other --dimensions."
        )


def _members(
    pairs: Sequence[tuple[Unit, Unit]], suite: Suite, installation: Installation
) -> dict[str, list[tuple[Unit, Unit]]]:
    """The pairs that each dimension scores: all in custom mode, else those whose prompt the benchmark lists for it."""
    if suite.mode == "custom_input":
        return {name: list(pairs) for name in suite.scored}
    listed: dict[str, set[str]] = {}
    for entry in parse(
        FullInfo, {"entries": read_json(path := _full_info(suite, installation))}, path, "Install VBench again."
    ).entries:
        for name in entry.dimension:
            listed.setdefault(name, set()).add(entry.prompt_en)
    members = {
        name: [pair for pair in pairs if pair[0].score_prompt in listed.get(name, set())] for name in suite.scored
    }
    empty = [name for name, found in members.items() if not found]
    if empty:
        raise PtqError(
            f"No video was made from VBench's prompts for {', '.join(empty)}. Suite {suite.name} scores VBench's own prompt list; generate it, use --dimensions, or use --suite icme2026 for other prompts."
        )
    return members


def _full_info(suite: Suite, installation: Installation) -> Path:
    name = _FULL_INFO[suite.vbench]
    folders = (installation.package, installation.package.parent / suite.vbench)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise PtqError(f"{name} is in none of {', '.join(map(str, folders))}. Pass a VBench checkout with --vbench-root.")


def _staged_name(unit: Unit, suite: Suite) -> str:
    name = unit.video.name if suite.mode == "custom_input" else standard_name(unit)
    if "/" in name or len(name.encode()) > _MAX_NAME_BYTES:
        raise PtqError(
            f"VBench needs the prompt of unit {unit.name} as a file name, which is impossible: {name[:80]}..."
        )
    return name


def _score(job: _Job, suite: Suite, settings: VBenchSettings, installation: Installation) -> DimensionRows:
    """Rows of one dimension: the kept result when its inputs are the same, else a run of the driver."""
    inputs = digest([
        job.dimension, suite.mode, suite.vbench, installation.describe(), DRIVER_VERSION, settings.device,
        sorted((name, unit.line.video_sha256, unit.score_prompt) for name, unit in job.units.items()),
    ])  # fmt: skip
    kept = job.folder / "result.json"
    if kept.is_file():
        value = parse(KeptResult, read_json(kept), kept, "Delete it and run the same command again.")
        if value.inputs == inputs and value.results_digest == digest(value.results):
            return _checked(value.results, job)
    results = _run_driver(job, suite, settings, installation)
    rows = _checked(results, job)
    KeptResult(inputs=inputs, results=results, results_digest=digest(results)).write(kept)
    return rows


def _checked(results: Any, job: _Job) -> DimensionRows:
    """The dimension's rows; refuses fewer rows than videos, except where VBench leaves videos out by design."""
    rows = parse_results(results, f"the result of {job.dimension}")[job.dimension]
    missing = set(job.units) - set(rows.rows)
    if missing and job.dimension not in PARTIAL:
        raise PtqError(
            f"VBench scored {len(rows.rows)} of {len(job.units)} videos; {sorted(missing)[0]} is among the missing."
        )
    return rows


def _run_driver(job: _Job, suite: Suite, settings: VBenchSettings, installation: Installation) -> Any:
    staging, out, log = job.folder / "videos", job.folder / "out", job.folder / "log.txt"
    for old in (staging, out):
        if old.exists():
            shutil.rmtree(old)
        old.mkdir(parents=True)
    for name, unit in job.units.items():
        (staging / name).symlink_to(unit.video.resolve())
    unit = next(iter(job.units.values()))
    ratio = (unit.line.width or 0) / (unit.line.height or 1)
    write_json(job.folder / "job.json", {
        "package": suite.vbench,
        "root": str(settings.root.resolve()) if settings.root else None,
        "mode": suite.mode,
        "name": "ptq",
        "dimension": job.dimension,
        "videos": str(staging.resolve()),
        "prompts": {name: unit.score_prompt for name, unit in job.units.items()},
        "full_info": "" if suite.mode == "custom_input" else str(_full_info(suite, installation)),
        "out": str(out.resolve()),
        "device": settings.device,
        "resolution": min(_RESOLUTIONS, key=lambda name: abs(_RESOLUTIONS[name] - ratio)),
    })  # fmt: skip
    command = [str(settings.python), str(DRIVER), "score", str((job.folder / "job.json").resolve())]
    # VBench-I2V looks for its images relative to the working directory.
    workplace = settings.root or installation.package.parent
    with open(log, "wb") as stream:
        code = run_child(command, stdout=stream, stderr=subprocess.STDOUT, cwd=workplace, env=foreign_environment())
    result = out / "ptq_eval_results.json"
    if code != 0 or not result.is_file():
        raise PtqError(f"exit code {code}{'' if code else ' but no result'}; {log} ends with: {_tail(log)}")
    return read_json(result, nan=True)


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_LOG_LINES:]) or "nothing"
