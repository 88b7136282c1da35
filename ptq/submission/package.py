"""`ptq package`: checkpoint, evaluation, report, source and instructions in one deterministic archive.

What it refuses is as important as what it packs: too many protected blocks, an evaluation of another checkpoint, a gate
that did not pass.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import yaml

from ptq.checkpoint.manifest import Manifest, verify_files
from ptq.errors import PtqError, UsageError
from ptq.generation import identify_model
from ptq.report import Sources
from ptq.report.facts import gather
from ptq.report.reproduce import RECIPE_FILE, reproduction
from ptq.rules import check_budget
from ptq.store.files import files_below, read_json, read_jsonl, sha256_file
from ptq.submission.archive import write_archive
from ptq.submission.instructions import readme, reproduce_script

CHECKSUMS = "SHA256SUMS"
SUBMISSION = "submission.json"
WEIGHTS = "weights"
SOURCE_SUFFIXES = {".py", ".yaml", ".json", ".html", ".typ", ".css", ".js", ".safetensors", ".txt", ".md", ".model"}
PROJECT_FILES = ("pyproject.toml", "constraints.txt", "LICENSE", "README.md", "Makefile")
PASS = "PASS"


def collect(
    checkpoint: Path, evaluation: Path, *, pdf: bytes, html: bytes, allow_failing: bool
) -> dict[str, Path | bytes]:
    """Members of the archive, checksums included.

    Args:
        checkpoint: packed checkpoint.
        evaluation: its evaluation directory.
        pdf, html: the technical report and the page.
        allow_failing: accept a gate that did not pass; the archive is then marked.

    Raises:
        UsageError: over the block budget, evaluation of another checkpoint, failed gate.
        DamagedFileError: the checkpoint is not as its manifest says.
    """
    manifest = verify_files(checkpoint)
    verdict = read_json(evaluation / "evaluation.json")
    check_submittable(checkpoint, manifest, verdict, allow_failing=allow_failing)
    runs = {role: _run_directory(verdict, role) for role in ("reference", "candidate")}
    members: dict[str, Path | bytes] = {
        f"{WEIGHTS}/{path.relative_to(checkpoint).as_posix()}": path for path in files_below(checkpoint)
    }
    members |= {f"evaluation/{name}": evaluation / name for name in ("evaluation.json", "units.jsonl")}
    for role, run in runs.items():
        members[f"runs/{role}/run.json"] = run / "run.json"
        members |= {f"runs/{role}/{path.name}": path for path in sorted(run.glob("manifest-*.jsonl"))}
    members |= {f"source/{name}": path for name, path in source_files().items()}
    members["report/report.pdf"] = pdf
    members["report/report.html"] = html
    members[RECIPE_FILE] = yaml.safe_dump(
        manifest.recipe.model_dump(mode="json"), sort_keys=True, allow_unicode=True
    ).encode()
    members["prompts.jsonl"] = _prompts(runs["candidate"])
    members["README.md"] = readme(manifest, verdict).encode()
    steps = reproduction(gather(Sources(evaluation, checkpoint, *runs.values())))
    members["reproduce.sh"] = reproduce_script(steps, manifest).encode()
    members[SUBMISSION] = (json.dumps(_facts(manifest, verdict), indent=2, sort_keys=True) + "\n").encode()
    members[CHECKSUMS] = _checksums(members)
    return members


def package(
    checkpoint: Path, evaluation: Path, out: Path, *, pdf: bytes, html: bytes, allow_failing: bool = False
) -> int:
    """Write the archive; returns its size in bytes. Arguments and errors as `collect`."""
    members = collect(checkpoint, evaluation, pdf=pdf, html=html, allow_failing=allow_failing)
    write_archive(out, members)
    return out.stat().st_size


def estimated_bytes(checkpoint: Path) -> int:
    """Size of the weights that will be packed; the rest is small beside them."""
    return sum(path.stat().st_size for path in files_below(checkpoint))


def check_submittable(checkpoint: Path, manifest: Manifest, verdict: dict[str, Any], *, allow_failing: bool) -> None:
    """Refuse what the challenge, or honesty, does not allow.

    Raises:
        UsageError: names the rule and what to do.
    """
    protected: dict[str, dict[int, str]] = {}
    for item in manifest.high_precision:
        expert, _, block = item.partition(":")
        protected.setdefault(expert, {})[int(block)] = "from the manifest"
    check_budget(manifest.format, protected, manifest.budget_scope)
    digest = identify_model(str(checkpoint), checkpoint).digest
    evaluated = verdict.get("candidate", {}).get("checkpoint_digest")
    if evaluated != digest:
        raise UsageError(
            f"The evaluation judged a checkpoint with digest {str(evaluated)[:12]}, but {checkpoint} has {digest[:12]}. Generate and evaluate with this checkpoint, or pass the right --evaluation."
        )
    if verdict.get("verdict") != PASS and not allow_failing:
        raise UsageError(
            f"The evaluation's verdict is {verdict.get('verdict')}, not {PASS}. Improve the checkpoint or evaluate more units; --allow-failing-gate packs it all the same and marks the archive."
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


def _run_directory(verdict: dict[str, Any], role: str) -> Path:
    directory = verdict.get(role, {}).get("directory")
    if not directory or not Path(directory).is_dir():
        raise PtqError(
            f"The evaluation names {directory!r} as its {role} run, which is not here. Package on the machine that holds both generation directories, or evaluate them again from where they are now."
        )
    return Path(directory)


def _prompts(run: Path) -> bytes:
    """Prompts and seeds of every finished unit, one JSON line each, in unit order."""
    lines: dict[str, dict[str, Any]] = {}
    for path in sorted(run.glob("manifest-*.jsonl")):
        lines |= {line["unit"]: line for line in read_jsonl(path) if line.get("status") == "done"}
    keys = ("unit", "dataset", "sample_id", "k", "prompt", "score_prompt", "seed", "latent_sha256", "image_sha256")
    text = [json.dumps({key: lines[unit].get(key) for key in keys}, ensure_ascii=False) for unit in sorted(lines)]
    return ("\n".join(text) + "\n").encode()


def _facts(manifest: Manifest, verdict: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "format": manifest.format,
        "variant": manifest.variant,
        "checkpoint_digest": verdict["candidate"]["checkpoint_digest"],
        "verdict": verdict["verdict"],
        "failing_gate_allowed": verdict["verdict"] != PASS,
        "limit": verdict["limit"],
        "high_precision": manifest.high_precision,
        "budget_scope": manifest.budget_scope,
    }


def _checksums(members: dict[str, Path | bytes]) -> bytes:
    """One line a member in the form that `sha256sum --check` reads."""
    lines = []
    for name in sorted(members):
        source = members[name]
        value = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_file(source)
        lines.append(f"{value}  {name}\n")
    return "".join(lines).encode()
