"""`ptq package`: checkpoint, evaluation, report, source and instructions in one deterministic archive.

What it refuses is as important as what it packs: too many protected blocks, an evaluation of another checkpoint, a gate
that did not pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import distribution
from pathlib import Path, PurePosixPath

from ptq import limits
from ptq.checkpoint.manifest import Manifest, verify_files
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.evaluation.overlap import seen_in_calibration
from ptq.evaluation.pairs import is_measured_on
from ptq.evaluation.runs import Run, read_run
from ptq.evaluation.statistics import CONFIDENCE
from ptq.evaluation.suites import get_suite
from ptq.report import Report
from ptq.report.locate import find_calibration
from ptq.rules import BUDGET_SCOPE, GATE, MIN_RESAMPLES, check_budget, loss_limit
from ptq.store.evaluation import FILE as EVALUATION_FILE
from ptq.store.evaluation import PASS, ROLES, Evaluation, read_evaluation
from ptq.store.evaluation_units import FILE as UNITS_FILE
from ptq.store.evaluation_units import UnitLine, read_units
from ptq.store.files import files_below, sha256_file
from ptq.store.run_info import FILE as RUN_FILE
from ptq.store.run_info import read_run_info
from ptq.store.run_manifest import FILE_KEYS, PATTERN, finished_lines
from ptq.submission.archive import write_archive
from ptq.submission.contents import CALIBRATION, CHECKSUMS, EVALUATION, REPORT, RUNS, SOURCE, WEIGHTS
from ptq.submission.derive import derive
from ptq.wan.identity import identify_model

MEASURED_BYTES = 256 * 2**20
"""Videos, latents and frames of both runs are packed up to here: those of the embedded models, not those of 720p."""
SOURCE_SUFFIXES = {".py", ".yaml", ".json", ".html", ".typ", ".css", ".js", ".safetensors", ".txt", ".md", ".model"}
_DATA = frozenset(
    {
        *(".safetensors", ".json", ".model", ".txt", ".jinja"),
        *(".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4"),
    }
)
"""Endings of files below weights/: weights, settings, vocabularies, and what a model card shows. None of them is run."""
_NOTICES = frozenset({"LICENSE", "NOTICE"})
PROJECT_FILES = ("pyproject.toml", "constraints.txt", "LICENSE", "README.md", "Makefile")


def collect(checkpoint: Path, evaluation: Path, report: Report, *, allow_failing: bool) -> dict[str, Path | bytes]:
    """Members of the archive, checksums included.

    Args:
        checkpoint: packed checkpoint.
        evaluation: its evaluation directory.
        report: the technical report and the page.
        allow_failing: accept a gate that did not pass; the archive is then marked.

    Raises:
        UsageError: over the block budget, evaluation of another checkpoint or by other rules, failed gate.
        DamagedFileError: the checkpoint is not as its manifest says.
    """
    manifest = verify_files(checkpoint)
    judged = read_evaluation(evaluation)
    check_submittable(checkpoint, manifest, judged, allow_failing=allow_failing)
    runs = {role: _run_directory(judged, role) for role in ROLES}
    _check_measured(judged, read_units(evaluation), {role: read_run(run) for role, run in runs.items()}, manifest)
    members: dict[str, Path | bytes] = {
        f"{WEIGHTS}/{path.relative_to(checkpoint).as_posix()}": path for path in files_below(checkpoint)
    }
    members |= {f"{EVALUATION}/{name}": evaluation / name for name in (EVALUATION_FILE, UNITS_FILE)}
    for role, run in runs.items():
        members[f"{RUNS}/{role}/{RUN_FILE}"] = run / RUN_FILE
        members |= {f"{RUNS}/{role}/{path.name}": path for path in sorted(run.glob(PATTERN))}
    members |= _measured_files(runs)
    members |= {f"{SOURCE}/{name}": path for name, path in source_files().items()}
    members[f"{REPORT}/report.pdf"] = report.pdf
    members[f"{REPORT}/report.html"] = report.html
    calibration = None
    if manifest.calibration is not None:
        calibration = find_calibration(evaluation, checkpoint, manifest.calibration["digest"])
    if calibration is not None:
        members[CALIBRATION] = (json.dumps(calibration.as_json(), indent=2, ensure_ascii=False) + "\n").encode()
    infos = {role: read_run_info(run) for role, run in runs.items()}
    members |= derive(checkpoint, manifest, judged, calibration, infos, finished_lines(runs["candidate"]))
    members[CHECKSUMS] = _checksums(members)
    return members


def _measured_files(runs: Mapping[str, Path]) -> dict[str, Path]:
    """Videos, latents and frames of both runs, where all together are small: `ptq verify` then measures them again."""
    files = {
        f"{RUNS}/{role}/{name}": run / name
        for role, run in runs.items()
        for line in finished_lines(run).values()
        for key in FILE_KEYS
        if (name := getattr(line, key))
    }
    whole = all(path.is_file() for path in files.values())
    return files if whole and sum(path.stat().st_size for path in files.values()) <= MEASURED_BYTES else {}


def package(checkpoint: Path, evaluation: Path, out: Path, report: Report, *, allow_failing: bool = False) -> int:
    """Write the archive; returns its size in bytes. Arguments and errors as `collect`."""
    write_archive(out, collect(checkpoint, evaluation, report, allow_failing=allow_failing))
    return out.stat().st_size


def planned(checkpoint: Path, evaluation: Path, judged: Evaluation) -> dict[str, list[Path]]:
    """What will be packed -> its files; the report, the instructions and the checksums are made while packing.

    Raises:
        PtqError: a run of the evaluation is not here.
    """
    runs = {role: _run_directory(judged, role) for role in ROLES}
    return {
        "weights": list(files_below(checkpoint)),
        "evaluation": [evaluation / name for name in (EVALUATION_FILE, UNITS_FILE)],
        "settings and manifests of both runs": [
            path for run in runs.values() for path in (run / RUN_FILE, *sorted(run.glob(PATTERN)))
        ],
        "videos, latents and frames of both runs": list(_measured_files(runs).values()),
        "source": list(source_files().values()),
    }


def _check_measured(judged: Evaluation, units: list[UnitLine], runs: Mapping[str, Run], manifest: Manifest) -> None:
    """Refuse runs that were made again, or changed, after the evaluation, and prompts that the weights were calibrated with.

    Raises:
        UsageError: names the run or the unit.
    """
    advice = "Run `ptq evaluate` again into that directory, and package then."
    for role, run in runs.items():
        if run.info.digest != getattr(judged, role).run_digest:
            raise UsageError(f"{run.directory} is another run than the {role} that was evaluated. {advice}")
    ours, theirs = (runs[role].units for role in ROLES)
    suite, stride = get_suite(judged.suite), judged.stride or 1
    for line in units:
        pair = ours.get(line.unit), theirs.get(line.unit)
        if not pair[0] or not pair[1] or not is_measured_on(line, pair[0], pair[1], suite, stride):
            raise UsageError(
                f"Unit {line.unit} was measured on other files than the runs have now, or its scores were changed. {advice}"
            )
    seen = seen_in_calibration(manifest, {name: unit.line for name, unit in theirs.items()})
    if seen:
        raise UsageError(
            f"{len(seen)} of {len(theirs)} evaluated units are of prompts that the checkpoint was calibrated with, for example {seen[0]}. Evaluate others: `ptq generate --exclude` leaves out the prompts of a file."
        )


def check_submittable(checkpoint: Path, manifest: Manifest, judged: Evaluation, *, allow_failing: bool) -> None:
    """Refuse what the challenge, or honesty, does not allow.

    Raises:
        UsageError: names the rule and what to do. DamagedFileError: as `refuse_code`.
    """
    protected: dict[str, set[str]] = {}
    for item in manifest.high_precision:
        expert, _, block = item.partition(":")
        protected.setdefault(expert, set()).add(block)
    check_budget(manifest.format, protected, BUDGET_SCOPE)
    refuse_code(manifest.files)
    digest = identify_model(str(checkpoint), checkpoint).digest
    evaluated = judged.candidate.checkpoint_digest
    if evaluated != digest:
        raise UsageError(
            f"The evaluation judged a checkpoint with digest {str(evaluated)[:12]}, but {checkpoint} has {digest[:12]}. Generate and evaluate with this checkpoint, or pass the right --evaluation."
        )
    problem = broken_rule(judged, manifest.format)
    if problem is not None:
        raise UsageError(
            f"The evaluation is not by the rules: {problem}. Evaluate both runs again, whole and by the rules."
        )
    if judged.verdict is None and not allow_failing:
        raise UsageError(
            f"The evaluation has no verdict: suite {judged.suite} has none for {manifest.format}. Evaluate both runs again with --suite icme2026, an embedded model's with --suite tiny; --allow-failing-gate packs it all the same and marks the archive."
        )
    if judged.verdict != PASS and not allow_failing:
        raise UsageError(
            f"The evaluation's verdict is {judged.verdict}, not {PASS}. Improve the checkpoint or evaluate more units; --allow-failing-gate packs it all the same and marks the archive."
        )


def refuse_code(names: Iterable[str]) -> None:
    """Refuse files of a checkpoint that are neither weights nor settings nor papers, hidden ones among them.

    Raises:
        DamagedFileError: names the first.
    """
    for name in sorted(names):
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") for part in path.parts)
        if hidden or (path.suffix.lower() not in _DATA and path.name not in _NOTICES):
            raise DamagedFileError(
                f"{name} does not belong among weights: it may hold code, or what no digest covers. Quantize a copy of the model without it"
            )


def broken_rule(judged: Evaluation, format_name: str) -> str | None:
    """How an evaluation of weights of this format was not made as the rules say, or None.

    The rules decide, and the weights; what the evaluation says of itself is compared with them.
    """
    suite = get_suite(judged.suite)
    gate, limit = (GATE, loss_limit(format_name)) if suite.gate else (None, None)
    wrong = {
        "the format": (judged.format, format_name),
        "the gate": (judged.gate, gate),
        "the limit": (judged.limit, limit),
        "the confidence": (judged.bootstrap.confidence, CONFIDENCE),
    }
    for name, (found, wanted) in wrong.items():
        if found != wanted:
            return f"{name} is {found}, by the rules {wanted}"
    if not MIN_RESAMPLES <= judged.bootstrap.resamples <= limits.RESAMPLES:
        return f"intervals are made from {judged.bootstrap.resamples} resamples, by the rules from {MIN_RESAMPLES} to {limits.RESAMPLES}"
    if judged.bootstrap.seed < 0:
        return f"the seed of the intervals is {judged.bootstrap.seed}"
    if judged.excluded:
        return f"{len(judged.excluded)} units are left out, for example {next(iter(judged.excluded))}"
    if judged.yardstick is not None:
        return "it has a yardstick, whose run is no part of a submission (evaluate without --yardstick; what was measured is kept)"
    odd = sorted(set(judged.dimensions) ^ set(suite.gate))
    if odd:
        return f"suite {suite.name} counts {', '.join(suite.gate) or 'no dimension'}, the evaluation has {', '.join(judged.dimensions) or 'none'}"
    return None


def source_files() -> dict[str, Path]:
    """The package's own source and, where it runs from a checkout, the project files beside it."""
    package_root = Path(__file__).resolve().parent.parent
    files = {
        f"ptq/{path.relative_to(package_root).as_posix()}": path
        for path in files_below(package_root)
        if path.suffix in SOURCE_SUFFIXES and "__pycache__" not in path.parts
    }
    project = package_root.parent
    if (project / "pyproject.toml").exists():
        files |= {name: project / name for name in PROJECT_FILES if (project / name).exists()}
    else:
        licence = next((f for f in distribution("wan-ptq").files or () if f.name == "LICENSE"), None)
        if licence is not None:
            files["LICENSE"] = Path(str(licence.locate()))
    return files


def _run_directory(judged: Evaluation, role: str) -> Path:
    directory = getattr(judged, role).directory
    if not directory or not Path(directory).is_dir():
        raise PtqError(
            f"The evaluation names {directory!r} as its {role} run, which is not here. Package on the machine that holds both generation directories, or evaluate them again from where they are now."
        )
    return Path(directory)


def _checksums(members: dict[str, Path | bytes]) -> bytes:
    """One line a member in the form that `sha256sum --check` reads."""
    lines = []
    for name in sorted(members):
        source = members[name]
        value = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_file(source)
        lines.append(f"{value}  {name}\n")
    return "".join(lines).encode()
