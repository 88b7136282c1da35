"""`ptq verify`: does this archive hold what it claims? Every check has a reason a reviewer can read.

Nothing in the archive is trusted: it is unpacked defensively, every byte is compared with the checksums, the block budget
is counted from the tensors themselves, the verdict is computed again from the scores of every unit, the checkpoint is
loaded, and one unit is generated again and compared with its recorded hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ptq.checkpoint.manifest import read_manifest, verify_files
from ptq.checkpoint.shards import ShardSet
from ptq.errors import DamagedFileError, PtqError
from ptq.evaluation.scores import scores_from_units
from ptq.evaluation.statistics import verdict as judge
from ptq.generation import Settings, run_generation
from ptq.prompts import Sample
from ptq.rules import check_budget, loss_limit
from ptq.store.evaluation import PASS, ROLES, read_evaluation
from ptq.store.evaluation_units import read_units
from ptq.store.files import scratch_directory, sha256_file
from ptq.store.run_info import read_run_info
from ptq.store.run_manifest import finished_lines
from ptq.store.submission import FILE as SUBMISSION
from ptq.store.submission import read_submission
from ptq.submission.archive import extract_archive
from ptq.submission.package import CHECKSUMS, WEIGHTS
from ptq.wan.block import block_prefix
from ptq.wan.identity import identify_model
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline

REQUIRED = (
    *(CHECKSUMS, SUBMISSION, "README.md", "reproduce.sh", "recipe.yaml", "prompts.jsonl", "report/report.pdf"),
    *("evaluation/evaluation.json", "evaluation/units.jsonl", "runs/reference/run.json", "runs/candidate/run.json"),
    *(f"{WEIGHTS}/model_index.json", f"{WEIGHTS}/ptq_manifest.json", "source/ptq/__init__.py", "source/LICENSE"),
)
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Check:
    """One question about the archive; `problem` is None when the answer is yes."""

    name: str
    problem: str | None


def verify(archive: Path, *, max_bytes: int, regenerate: bool = True) -> list[Check]:
    """Run every check; a check whose basis is missing is reported as failed, later checks still run.

    Args:
        archive: submission.tar.gz.
        max_bytes: refuse to unpack more.
        regenerate: generate one unit again (needs as much memory and time as one video).

    Raises:
        DamagedFileError: the archive cannot be unpacked safely.
    """
    with scratch_directory("ptq-verify") as root:
        names = extract_archive(archive, root, max_bytes)
        checks: list[tuple[str, Callable[[], object]]] = [
            ("all required members are there", lambda: check_members(names)),
            ("every member has its recorded checksum", lambda: check_checksums(root, names)),
            ("the checkpoint is as its manifest says", lambda: verify_files(root / WEIGHTS)),
            ("protected blocks are within the budget, counted from the tensors", lambda: check_blocks(root / WEIGHTS)),
            ("the evaluation judged this checkpoint", lambda: check_evaluation(root)),
            ("the verdict follows from the scores of the units", lambda: check_verdict(root)),
            ("the checkpoint loads", lambda: load_pipeline(root / WEIGHTS)),
        ]
        if regenerate:
            checks.append(("one unit, generated again, has its recorded hash", lambda: check_unit(root)))
        return list(_run(checks))


def _run(checks: list[tuple[str, Callable[[], object]]]) -> Iterator[Check]:
    for name, check in checks:
        try:
            check()
        except (PtqError, KeyError, OSError, ValueError) as error:
            yield Check(name, str(error) if isinstance(error, PtqError) else f"{type(error).__name__}: {error}")
        else:
            yield Check(name, None)


def check_members(names: list[str]) -> None:
    """Required members.

    Raises:
        DamagedFileError: names what is missing.
    """
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise DamagedFileError(f"missing: {', '.join(missing)}")


def check_checksums(root: Path, names: list[str]) -> None:
    """Compare every member with SHA256SUMS, in both directions.

    Raises:
        DamagedFileError: names the first member that differs.
    """
    recorded = {}
    for line in (root / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        value, separator, name = line.partition("  ")
        if not separator:
            raise DamagedFileError(f"{CHECKSUMS} has a damaged line: {line[:80]!r}")
        recorded[name] = value
    unlisted = sorted(set(names) - set(recorded) - {CHECKSUMS})
    if unlisted:
        raise DamagedFileError(f"{unlisted[0]} is not listed in {CHECKSUMS} ({len(unlisted)} such members)")
    for name, value in recorded.items():
        if name not in names:
            raise DamagedFileError(f"{name} is listed in {CHECKSUMS} but not in the archive")
        if sha256_file(root / name) != value:
            raise DamagedFileError(f"{name} was changed: its sha256 is not the recorded one")


def check_blocks(weights: Path) -> None:
    """Count protected blocks from the tensors and compare with configuration, manifest and budget.

    Raises:
        DamagedFileError: the three disagree.
        UsageError: more than the budget.
    """
    manifest, layout = read_manifest(weights), read_layout(weights)
    protected: dict[str, set[int]] = {}
    for expert, config in layout.experts.items():
        entries = ShardSet(weights / expert).entries
        found = {
            index
            for index in range(layout.num_blocks(expert))
            if any(
                f"{block_prefix(index)}{linear}.weight_packed" not in entries for linear in layout.linear_shapes(expert)
            )
        }
        declared = set(config["quantization_config"]["high_precision_blocks"])
        if found != declared:
            raise DamagedFileError(
                f"{expert}: config.json declares protected blocks {declared}, the tensors say {found}"
            )
        protected[expert] = found
    listed = {f"{expert}:{index}" for expert, blocks in protected.items() for index in blocks}
    if listed != set(manifest.high_precision):
        raise DamagedFileError(
            f"the manifest lists protected blocks {manifest.high_precision}, the tensors {sorted(listed)}"
        )
    check_budget(manifest.format, protected, manifest.budget_scope)


def check_evaluation(root: Path) -> None:
    """The evaluation, both runs and the weights belong together.

    Raises:
        DamagedFileError: names the two digests that differ.
    """
    digest = identify_model(WEIGHTS, root / WEIGHTS).digest
    evaluation = read_evaluation(root / "evaluation")
    for what, value in (
        ("the evaluation", evaluation.candidate.checkpoint_digest),
        ("the candidate run", read_run_info(root / "runs/candidate").checkpoint.digest),
        (SUBMISSION, read_submission(root).checkpoint_digest),
    ):
        if value != digest:
            raise DamagedFileError(
                f"{what} is of a checkpoint with digest {str(value)[:12]}, the weights have {digest[:12]}"
            )
    for role in ROLES:
        if getattr(evaluation, role).run_digest != read_run_info(root / f"runs/{role}").digest:
            raise DamagedFileError(f"the evaluation's {role} run is another one than runs/{role}")
    units = {line.unit for line in read_units(root / "evaluation")}
    done = set(finished_lines(root / "runs/candidate"))
    if units != done and not evaluation.excluded:
        raise DamagedFileError(f"the evaluation scored {len(units)} units, the candidate run finished {len(done)}")


def check_verdict(root: Path) -> None:
    """Compute the gate again from units.jsonl.

    Raises:
        DamagedFileError: another loss or verdict than evaluation.json says, or a gate that did not pass.
    """
    recorded = read_evaluation(root / "evaluation")
    if recorded.gate is None or recorded.deciding is None:
        raise DamagedFileError("evaluation.json has no gate: its suite counts no dimension")
    scores = scores_from_units(read_units(root / "evaluation"), recorded.dimensions)
    again = scores.compare(scores.reference, resamples=recorded.bootstrap.resamples, seed=recorded.bootstrap.seed)
    estimate, claimed = again.aggregates[recorded.gate], recorded.deciding
    if abs(estimate.value - claimed.value) > TOLERANCE:
        raise DamagedFileError(
            f"evaluation.json says a loss of {claimed.value:.6%}, its units give {estimate.value:.6%}"
        )
    limit = loss_limit(read_manifest(root / WEIGHTS).format)
    verdict = None if limit is None else judge(estimate, limit)
    if verdict != recorded.verdict or recorded.limit != limit:
        raise DamagedFileError(f"evaluation.json says {recorded.verdict}, its units give {verdict}")
    if verdict != PASS:
        raise DamagedFileError(f"the gate did not pass ({verdict}); the archive was packed with --allow-failing-gate")


def check_unit(root: Path) -> None:
    """Generate one unit again and compare final latents and video with the manifest.

    Raises:
        DamagedFileError: other bytes; says whether machine and versions are the recorded ones.
    """
    run = read_run_info(root / "runs/candidate")
    finished = finished_lines(root / "runs/candidate")
    candidates = [unit for unit in sorted(finished) if not finished[unit].image_sha256 and finished[unit].k == 0]
    if not candidates:
        raise DamagedFileError("no unit can be generated from the archive alone: all of them start from an image")
    line = finished[candidates[0]]
    sample = Sample(str(line.dataset), str(line.sample_id), str(line.prompt), str(line.score_prompt))
    with scratch_directory("ptq-verify-unit") as folder:
        out = folder / "run"
        model = identify_model(WEIGHTS, root / WEIGHTS)
        settings = Settings.from_json(run.settings)
        run_generation(lambda: load_pipeline(root / WEIGHTS), [sample], settings, out, model=model)
        again = finished_lines(out)[line.unit]
    keys = ("latent_sha256", "final_latents_sha256", "video_sha256")
    different = [key for key in keys if getattr(again, key) != getattr(line, key)]
    if different:
        installed = {name: version(name) for name in run.versions if name != "ptq"}
        versions = "the same" if installed.items() <= run.versions.items() else "other"
        raise DamagedFileError(
            f"{line.unit}: {', '.join(different)} differ. Recorded on {line.device}, here {again.device}, with {versions} library versions; bit-equality is promised on the same hardware and versions only."
        )
