"""What `ptq package` packs, refuses and marks; rehearsals without an interval or a gate verify honestly."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from submission_helpers import copy_measured

from ptq.checkpoint.manifest import MANIFEST_FILE, hash_files
from ptq.errors import UsageError
from ptq.evaluation import evaluate_runs
from ptq.evaluation.runs import read_run
from ptq.evaluation.suites import get_suite
from ptq.prompts import caption_digest
from ptq.report import Report, Sources, render
from ptq.report.facts import gather
from ptq.report.reproduce import reproduction
from ptq.store.files import read_json, write_json
from ptq.submission.package import package
from ptq.submission.unpack import extract_archive
from ptq.submission.verify import verify

REPORT = Report("the report", None, html=b"<html></html>", pdf=b"%PDF-1.7 report")


def not_holding(archive: Path) -> list[Any]:
    return [claim for claim in verify(archive, max_bytes=10**9, regenerate=False) if claim.holds is False]


def test_same_inputs_give_the_same_bytes(archive: Path, job, tmp_path: Path) -> None:
    package(job.checkpoint, job.evaluation, tmp_path / "again.tar.gz", REPORT, allow_failing=True)
    assert (tmp_path / "again.tar.gz").read_bytes() == archive.read_bytes()


def test_a_rehearsal_without_an_interval_is_packed_and_says_so(job, tmp_path: Path) -> None:
    """One prompt bounds nothing: the interval is None in evaluation.json, report, README and verification."""
    runs = [copy_measured(job.run(role), tmp_path / role, units=1) for role in ("reference", "candidate")]
    judged = evaluate_runs(*runs, tmp_path / "evaluation", suite="tiny", resamples=1000)
    assert judged.verdict == "INCONCLUSIVE" and judged.deciding is not None and judged.deciding.low is None
    report = render(Sources(tmp_path / "evaluation", job.checkpoint), videos=1)
    archive = tmp_path / "rehearsal.tar.gz"
    package(job.checkpoint, tmp_path / "evaluation", archive, report, allow_failing=True)
    claims = verify(archive, max_bytes=10**9, regenerate=False)
    assert [claim for claim in claims if claim.holds is False] == []
    verdict = next(claim for claim in claims if claim.name.startswith("the verdict"))
    assert verdict.found.startswith("INCONCLUSIVE: a rehearsal, the gate did not pass")
    with tarfile.open(archive) as opened:
        assert b"[no interval]" in opened.extractfile("README.md").read()


def test_a_rehearsal_without_a_gate(job, tmp_path: Path) -> None:
    evaluate_runs(job.run("reference"), job.run("candidate"), tmp_path / "core", suite="core", resamples=1000)
    with pytest.raises(UsageError, match=r"no verdict: suite core has none .* --suite icme2026"):
        package(job.checkpoint, tmp_path / "core", tmp_path / "core.tar.gz", REPORT)
    package(job.checkpoint, tmp_path / "core", tmp_path / "core.tar.gz", REPORT, allow_failing=True)
    assert not_holding(tmp_path / "core.tar.gz") == []


@pytest.mark.parametrize("beside", [(), ("dynamic_degree",)], ids=["without", "beside"])
def test_imported_scores_of_the_challenge_pass_and_are_listed_as_not_measured_here(
    job, tmp_path: Path, beside: tuple[str, ...]
) -> None:
    files = []
    for role, factor in (("reference", 1.0), ("candidate", 0.999)):
        units = read_run(job.run(role)).units.values()
        table = {
            name: [
                0.5,
                [
                    {"video_path": unit.video.name, "video_results": (0.5 + i / 20) * factor}
                    for i, unit in enumerate(units)
                ],
            ]
            for name in (*get_suite("icme2026").gate, *beside)
        }
        files.append(tmp_path / f"{role}.json")
        files[-1].write_text(json.dumps(table))
    runs = job.run("reference"), job.run("candidate")
    judged = evaluate_runs(
        *runs, tmp_path / "icme", suite="icme2026", resamples=1000, import_vbench=(files[0], files[1])
    )
    assert judged.verdict == "PASS" and ("dynamic_degree" in judged.informative) == bool(beside)
    package(job.checkpoint, tmp_path / "icme", tmp_path / "icme.tar.gz", REPORT)
    claims = verify(tmp_path / "icme.tar.gz", max_bytes=10**9, regenerate=False)
    assert [claim for claim in claims if claim.holds is False] == []
    assert next(claim.found for claim in claims if claim.name.startswith("the verdict")) == "PASS"
    assert any(claim.name == "VBench's scores are those of the videos" and claim.holds is None for claim in claims)


def test_package_refuses_a_failed_gate_unless_told_and_then_marks_it(job, tmp_path: Path) -> None:
    failing = Path(shutil.copytree(job.evaluation, tmp_path / "failing"))
    write_json(failing / "evaluation.json", {**read_json(failing / "evaluation.json"), "verdict": "FAIL"})
    with pytest.raises(UsageError, match="allow-failing-gate"):
        package(job.checkpoint, failing, tmp_path / "no.tar.gz", REPORT)
    assert not (tmp_path / "no.tar.gz").exists()
    package(job.checkpoint, failing, tmp_path / "marked.tar.gz", REPORT, allow_failing=True)
    extract_archive(tmp_path / "marked.tar.gz", tmp_path / "marked", 10**9)
    assert read_json(tmp_path / "marked/submission.json")["failing_gate_allowed"] is True
    assert "although its gate did not pass" in (tmp_path / "marked/README.md").read_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gate": "mean_score"}, "the gate is mean_score, by the rules mean_signed"),
        ({"excluded": {"held-out/x/0": "failed"}}, "1 units are left out"),
        ({"limit": 0.05}, "the limit is 0.05, by the rules 0.005"),
        (
            {"yardstick": {"run": {"model": "fp8"}, "units": 4}},
            "it has a yardstick, whose run is no part of a submission",
        ),
    ],
    ids=str,
)
def test_package_refuses_what_verify_would(job, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    other = Path(shutil.copytree(job.evaluation, tmp_path / "other"))
    write_json(other / "evaluation.json", {**read_json(other / "evaluation.json"), **change})
    with pytest.raises(UsageError, match=reason):
        package(job.checkpoint, other, tmp_path / "no.tar.gz", REPORT, allow_failing=True)


def test_a_checkpoint_with_linked_components_is_packed_whole(job, archive: Path, tmp_path: Path) -> None:
    linked = Path(shutil.copytree(job.checkpoint, tmp_path / "hif4"))
    (tmp_path / "calibration").symlink_to(job.root / "calibration")  # found beside a checkpoint
    shutil.move(linked / "vae", tmp_path / "vae")
    (linked / "vae").symlink_to(tmp_path / "vae")
    package(linked, job.evaluation, tmp_path / "linked.tar.gz", REPORT, allow_failing=True)
    assert (tmp_path / "linked.tar.gz").read_bytes() == archive.read_bytes()


def test_package_refuses_an_evaluation_of_another_checkpoint(job, tmp_path: Path) -> None:
    other = Path(shutil.copytree(job.checkpoint, tmp_path / "other"))
    (other / "scheduler/scheduler_config.json").write_text("{}")
    manifest = read_json(other / MANIFEST_FILE)
    write_json(other / MANIFEST_FILE, {**manifest, "files": hash_files(other)})
    with pytest.raises(UsageError, match="judged a checkpoint"):
        package(other, job.evaluation, tmp_path / "no.tar.gz", REPORT)


@pytest.mark.parametrize("scope", ["total", "per-expert"])
def test_package_refuses_more_protected_blocks_than_the_budget(job, tmp_path: Path, scope: str) -> None:
    """Whatever scope the checkpoint was made with: a submission counts over all experts."""
    checkpoint = Path(shutil.copytree(job.checkpoint, tmp_path / "over"))
    manifest = read_json(checkpoint / MANIFEST_FILE)
    manifest["high_precision"] = ["transformer:0", "transformer:1", "transformer_2:0"]
    manifest["budget_scope"] = scope
    write_json(checkpoint / MANIFEST_FILE, manifest)
    with pytest.raises(UsageError, match="allows at most 2"):
        package(checkpoint, job.evaluation, tmp_path / "no.tar.gz", REPORT)


def test_the_script_runs_the_commands_of_the_report(archive: Path, job) -> None:
    """That the command line accepts them is tested where they are made (tests/report)."""
    listed = reproduction(gather(Sources(job.evaluation, job.checkpoint))).commands
    with tarfile.open(archive) as opened:
        script = opened.extractfile("reproduce.sh").read().decode()
    own = [line for line in script.splitlines() if line.startswith("ptq ")]
    assert own == listed[1:]
    assert [line.split()[1] for line in own] == ["calibrate", "quantize", "generate", "generate", "evaluate", "report"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("change", ["units", "videos", "settings"])
def test_what_was_changed_after_the_evaluation_is_not_packed(job, tmp_path: Path, change: str) -> None:
    runs = [Path(shutil.copytree(job.run(role), tmp_path / role)) for role in ("reference", "candidate")]
    evaluation = tmp_path / "evaluation"
    evaluate_runs(*runs, evaluation, suite="tiny", resamples=1000)
    manifest = runs[1] / "manifest-0of1.jsonl"
    if change == "units":
        lines = [json.loads(line) for line in (evaluation / "units.jsonl").read_text().splitlines()]
        lines[0]["candidate"]["colour"] = 1.0
        (evaluation / "units.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        digest = hashlib.sha256((evaluation / "units.jsonl").read_bytes()).hexdigest()
        write_json(
            evaluation / "evaluation.json", {**read_json(evaluation / "evaluation.json"), "units_sha256": digest}
        )
        reason = "was measured on other files than the runs have now, or its scores were changed"
    elif change == "videos":
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        lines[0]["saved_frames_sha256"] = "0" * 64
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        reason = "was measured on other files than the runs have now"
    else:
        write_json(runs[0] / "run.json", {**read_json(runs[0] / "run.json"), "digest": "0" * 64})
        reason = "is another run than the reference that was evaluated"
    with pytest.raises(UsageError, match=reason):
        package(job.checkpoint, evaluation, tmp_path / "x.tar.gz", REPORT, allow_failing=True)
    assert not (tmp_path / "x.tar.gz").exists()


def test_prompts_of_the_calibration_are_not_packed(job, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(job.checkpoint, tmp_path / "hif4"))
    manifest = read_json(checkpoint / MANIFEST_FILE)
    prompt = next(iter(read_run(job.run("candidate")).units.values())).line.prompt
    manifest["calibration"]["samples"][0]["caption_digest"] = caption_digest(prompt)
    write_json(checkpoint / MANIFEST_FILE, manifest)
    with pytest.raises(
        UsageError, match="1 of 4 evaluated units are of prompts that the checkpoint was calibrated with"
    ):
        package(checkpoint, job.evaluation, tmp_path / "x.tar.gz", REPORT, allow_failing=True)
