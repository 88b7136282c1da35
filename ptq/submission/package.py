"""`ptq package`: checkpoint, evaluation, report, source and instructions in one deterministic archive.

What it refuses is as important as what it packs: too many protected blocks, an evaluation of another checkpoint, a gate
that did not pass.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import distribution
from pathlib import Path

import yaml

from ptq.checkpoint.manifest import Manifest, verify_files
from ptq.errors import PtqError, UsageError
from ptq.report import Report, Sources
from ptq.report.facts import gather
from ptq.report.reproduce import RECIPE_FILE, reproduction
from ptq.rules import check_budget
from ptq.store.evaluation import FILE as EVALUATION_FILE
from ptq.store.evaluation import PASS, ROLES, Evaluation, read_evaluation
from ptq.store.evaluation_units import FILE as UNITS_FILE
from ptq.store.files import files_below, sha256_file
from ptq.store.run_info import FILE as RUN_FILE
from ptq.store.run_manifest import PATTERN, finished_lines
from ptq.store.submission import FILE as SUBMISSION
from ptq.store.submission import SubmissionInfo
from ptq.submission.archive import write_archive
from ptq.submission.instructions import readme, reproduce_script
from ptq.wan.identity import identify_model

CHECKSUMS = "SHA256SUMS"
WEIGHTS = "weights"
SOURCE_SUFFIXES = {".py", ".yaml", ".json", ".html", ".typ", ".css", ".js", ".safetensors", ".txt", ".md", ".model"}
PROJECT_FILES = ("pyproject.toml", "constraints.txt", "LICENSE", "README.md", "Makefile")


def collect(checkpoint: Path, evaluation: Path, report: Report, *, allow_failing: bool) -> dict[str, Path | bytes]:
    """Members of the archive, checksums included.

    Args:
        checkpoint: packed checkpoint.
        evaluation: its evaluation directory.
        report: the technical report and the page.
        allow_failing: accept a gate that did not pass; the archive is then marked.

    Raises:
        UsageError: over the block budget, evaluation of another checkpoint, failed gate.
        DamagedFileError: the checkpoint is not as its manifest says.
    """
    manifest = verify_files(checkpoint)
    judged = read_evaluation(evaluation)
    check_submittable(checkpoint, manifest, judged, allow_failing=allow_failing)
    runs = {role: _run_directory(judged, role) for role in ROLES}
    members: dict[str, Path | bytes] = {
        f"{WEIGHTS}/{path.relative_to(checkpoint).as_posix()}": path for path in files_below(checkpoint)
    }
    members |= {f"evaluation/{name}": evaluation / name for name in (EVALUATION_FILE, UNITS_FILE)}
    for role, run in runs.items():
        members[f"runs/{role}/{RUN_FILE}"] = run / RUN_FILE
        members |= {f"runs/{role}/{path.name}": path for path in sorted(run.glob(PATTERN))}
    members |= {f"source/{name}": path for name, path in source_files().items()}
    members["report/report.pdf"] = report.pdf
    members["report/report.html"] = report.html
    members[RECIPE_FILE] = yaml.safe_dump(
        manifest.recipe.model_dump(mode="json"), sort_keys=True, allow_unicode=True
    ).encode()
    members["prompts.jsonl"] = _prompts(runs["candidate"])
    members["README.md"] = readme(manifest, judged).encode()
    steps = reproduction(gather(Sources(evaluation, checkpoint, *runs.values())))
    members["reproduce.sh"] = reproduce_script(steps, manifest).encode()
    members[SUBMISSION] = _facts(manifest, judged).as_bytes()
    members[CHECKSUMS] = _checksums(members)
    return members


def package(checkpoint: Path, evaluation: Path, out: Path, report: Report, *, allow_failing: bool = False) -> int:
    """Write the archive; returns its size in bytes. Arguments and errors as `collect`."""
    write_archive(out, collect(checkpoint, evaluation, report, allow_failing=allow_failing))
    return out.stat().st_size


def estimated_bytes(checkpoint: Path) -> int:
    """Size of the weights that will be packed; the rest is small beside them."""
    return sum(path.stat().st_size for path in files_below(checkpoint))


def check_submittable(checkpoint: Path, manifest: Manifest, judged: Evaluation, *, allow_failing: bool) -> None:
    """Refuse what the challenge, or honesty, does not allow.

    Raises:
        UsageError: names the rule and what to do.
    """
    protected: dict[str, set[str]] = {}
    for item in manifest.high_precision:
        expert, _, block = item.partition(":")
        protected.setdefault(expert, set()).add(block)
    check_budget(manifest.format, protected, manifest.budget_scope)
    digest = identify_model(str(checkpoint), checkpoint).digest
    evaluated = judged.candidate.checkpoint_digest
    if evaluated != digest:
        raise UsageError(
            f"The evaluation judged a checkpoint with digest {str(evaluated)[:12]}, but {checkpoint} has {digest[:12]}. Generate and evaluate with this checkpoint, or pass the right --evaluation."
        )
    if judged.verdict != PASS and not allow_failing:
        raise UsageError(
            f"The evaluation's verdict is {judged.verdict}, not {PASS}. Improve the checkpoint or evaluate more units; --allow-failing-gate packs it all the same and marks the archive."
        )


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


def _prompts(run: Path) -> bytes:
    """Prompts and seeds of every finished unit, one JSON line each, in unit order."""
    lines = finished_lines(run)
    keys = ("unit", "dataset", "sample_id", "k", "prompt", "score_prompt", "seed", "latent_sha256", "image_sha256")
    text = [json.dumps({key: getattr(lines[unit], key) for key in keys}, ensure_ascii=False) for unit in sorted(lines)]
    return ("\n".join(text) + "\n").encode()


def _facts(manifest: Manifest, judged: Evaluation) -> SubmissionInfo:
    assert judged.candidate.checkpoint_digest is not None  # compared in `check_submittable`
    return SubmissionInfo(
        schema=1,
        format=manifest.format,
        variant=manifest.variant,
        checkpoint_digest=judged.candidate.checkpoint_digest,
        verdict=judged.verdict,
        failing_gate_allowed=judged.verdict != PASS,
        limit=judged.limit,
        high_precision=manifest.high_precision,
        budget_scope=manifest.budget_scope,
    )


def _checksums(members: dict[str, Path | bytes]) -> bytes:
    """One line a member in the form that `sha256sum --check` reads."""
    lines = []
    for name in sorted(members):
        source = members[name]
        value = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_file(source)
        lines.append(f"{value}  {name}\n")
    return "".join(lines).encode()
