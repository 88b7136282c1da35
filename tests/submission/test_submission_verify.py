"""A real (small) submission verifies; every way of tampering with it is found, with the reason."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ptq.checkpoint.manifest import MANIFEST_FILE, hash_files
from ptq.errors import UsageError
from ptq.evaluation import evaluate_runs
from ptq.generation import Settings, identify_model, run_generation
from ptq.prompts import Sample
from ptq.report import Report, Sources
from ptq.report.facts import gather
from ptq.report.reproduce import reproduction
from ptq.store.files import read_json, write_json
from ptq.submission.archive import extract_archive, write_archive
from ptq.submission.package import CHECKSUMS, package
from ptq.submission.verify import verify
from ptq.tiny.grammar import held_out_prompts
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline

LIMIT = 10**9

REPORT = Report("PASS", html=b"<html></html>", pdf=b"%PDF-1.7 report")


@pytest.fixture(scope="module")
def evaluated(packed, tmp_path_factory) -> tuple[Path, Path]:
    """A packed checkpoint and an evaluation of it against itself: zero loss, so the gate passes."""
    root = tmp_path_factory.mktemp("submission")
    checkpoint = packed["hif4"]
    samples = [Sample("held-out", f"{i:02d}", prompt, prompt) for i, prompt in enumerate(held_out_prompts(3))]
    preset = read_layout(checkpoint).preset.model_copy(update={"steps": 3, "num_frames": 5})
    settings = Settings(**preset.model_dump(exclude={"variant", "hub_id"}), save_frames=True)
    runs = [root / "reference", root / "candidate"]
    for run in runs:
        identity = identify_model("packed", checkpoint)
        run_generation(lambda: load_pipeline(checkpoint), samples, settings, run, model=identity)
    judged = evaluate_runs(*runs, root / "evaluation", suite="tiny", resamples=1000)
    assert judged.verdict == "PASS"
    return checkpoint, root / "evaluation"


@pytest.fixture(scope="module")
def archive(evaluated, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "submission.tar.gz"
    package(*evaluated, path, REPORT)
    return path


@pytest.fixture
def tampered(archive, tmp_path) -> Callable[..., list[str]]:
    """A function: change unpacked files, pack again (optionally with fitting checksums), return the problems found."""

    def run(change: Callable[[Path], None], *, fix_checksums: bool) -> list[str]:
        root = tmp_path / "unpacked"
        names = extract_archive(archive, root, LIMIT)
        change(root)
        members = {name: (root / name).read_bytes() for name in names if (root / name).exists()}
        if fix_checksums:
            lines = [f"{hashlib.sha256(d).hexdigest()}  {n}\n" for n, d in sorted(members.items()) if n != CHECKSUMS]
            members[CHECKSUMS] = "".join(lines).encode()
        write_archive(tmp_path / "changed.tar.gz", members)
        checks = verify(tmp_path / "changed.tar.gz", max_bytes=LIMIT, regenerate=False)
        return [f"{check.name}: {check.problem}" for check in checks if check.problem]

    return run


def test_everything_holds_including_a_unit_generated_again(archive):
    checks = verify(archive, max_bytes=LIMIT)
    assert [check for check in checks if check.problem] == []
    assert any("generated again" in check.name for check in checks)


def test_same_inputs_give_the_same_bytes(archive, evaluated, tmp_path):
    package(*evaluated, tmp_path / "again.tar.gz", REPORT)
    assert (tmp_path / "again.tar.gz").read_bytes() == archive.read_bytes()


def test_a_flipped_byte_in_any_kind_of_member_is_found(archive, tampered, tmp_path):
    for name in (
        "weights/vae/config.json",
        "evaluation/units.jsonl",
        "report/report.pdf",
        "source/ptq/version.py",
        CHECKSUMS,
    ):

        def flip(root: Path, name: str = name) -> None:
            data = bytearray((root / name).read_bytes())
            data[len(data) // 2] ^= 1
            (root / name).write_bytes(data)

        problems = tampered(flip, fix_checksums=False)
        assert any("checksum" in problem for problem in problems), name
        shutil.rmtree(tmp_path / "unpacked")


def test_a_removed_or_added_member_is_found(tampered, tmp_path):
    problems = tampered(lambda root: (root / "report/report.pdf").unlink(), fix_checksums=True)
    assert any("missing: report/report.pdf" in problem for problem in problems)


def test_a_protected_block_added_to_the_configuration_is_found(tampered):
    def protect(root: Path) -> None:
        path = root / "weights/transformer/config.json"
        config = read_json(path)
        config["quantization_config"]["high_precision_blocks"] = [0]
        write_json(path, config)
        _refresh_manifest(root / "weights", lambda manifest: manifest["high_precision"].append("transformer:0"))

    problems = tampered(protect, fix_checksums=True)
    assert any("counted from the tensors" in problem and "the tensors say" in problem for problem in problems)


def test_an_evaluation_of_another_checkpoint_is_found(tampered):
    def swap(root: Path) -> None:
        path = root / "evaluation/evaluation.json"
        content = read_json(path)
        content["candidate"]["checkpoint_digest"] = "0" * 64
        write_json(path, content)

    problems = tampered(swap, fix_checksums=True)
    assert any("judged this checkpoint" in problem and "000000000000" in problem for problem in problems)


def test_scores_that_do_not_give_the_verdict_are_found(tampered):
    def worsen(root: Path) -> None:
        path = root / "evaluation/units.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["candidate"]["temporal_flickering"] *= 0.5
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    problems = tampered(worsen, fix_checksums=True)
    assert any("follows from the scores" in problem for problem in problems)


def test_package_refuses_a_failed_gate_unless_told_and_then_marks_it(evaluated, tmp_path):
    checkpoint, evaluation = evaluated
    failing = Path(shutil.copytree(evaluation, tmp_path / "failing"))
    content = read_json(failing / "evaluation.json")
    write_json(failing / "evaluation.json", {**content, "verdict": "FAIL"})
    with pytest.raises(UsageError, match="allow-failing-gate"):
        package(checkpoint, failing, tmp_path / "no.tar.gz", REPORT)
    assert not (tmp_path / "no.tar.gz").exists()
    package(checkpoint, failing, tmp_path / "marked.tar.gz", REPORT, allow_failing=True)
    extract_archive(tmp_path / "marked.tar.gz", tmp_path / "marked", LIMIT)
    assert read_json(tmp_path / "marked/submission.json")["failing_gate_allowed"] is True
    assert "although its gate did not pass" in (tmp_path / "marked/README.md").read_text()


def test_a_checkpoint_with_linked_components_is_packed_whole(evaluated, tmp_path):
    checkpoint, evaluation = evaluated
    linked = Path(shutil.copytree(checkpoint, tmp_path / "linked"))
    for records in checkpoint.parent.glob("*-records"):  # reproduce.sh tells its settings, found beside a checkpoint
        (tmp_path / records.name).symlink_to(records)
    shutil.move(linked / "vae", tmp_path / "vae")
    (linked / "vae").symlink_to(tmp_path / "vae")
    archives = [tmp_path / "plain.tar.gz", tmp_path / "linked.tar.gz"]
    for source, archive in zip((checkpoint, linked), archives, strict=True):
        package(source, evaluation, archive, REPORT, allow_failing=True)
    assert archives[0].read_bytes() == archives[1].read_bytes()


def test_package_refuses_an_evaluation_of_another_checkpoint(evaluated, packed, tmp_path):
    with pytest.raises(UsageError, match="judged a checkpoint"):
        package(packed["mxfp4"], evaluated[1], tmp_path / "no.tar.gz", REPORT)


def test_package_refuses_more_protected_blocks_than_the_budget(evaluated, tmp_path):
    checkpoint = Path(shutil.copytree(evaluated[0], tmp_path / "over"))
    _refresh_manifest(
        checkpoint,
        lambda manifest: manifest["high_precision"].extend(["transformer:0", "transformer:1", "transformer_2:0"]),
    )
    with pytest.raises(UsageError, match="allows at most 2"):
        package(checkpoint, evaluated[1], tmp_path / "no.tar.gz", REPORT)


def _refresh_manifest(checkpoint: Path, change: Callable[[dict], None]) -> None:
    manifest = read_json(checkpoint / MANIFEST_FILE)
    change(manifest)
    manifest["files"] = hash_files(checkpoint)
    write_json(checkpoint / MANIFEST_FILE, manifest)


def test_the_script_runs_the_commands_of_the_report(archive, evaluated):
    """That the command line accepts them is tested where they are made (tests/report)."""
    checkpoint, evaluation = evaluated
    listed = reproduction(gather(Sources(evaluation, checkpoint))).commands
    with tarfile.open(archive) as packed_archive:
        script = packed_archive.extractfile("reproduce.sh").read().decode()
    own = [line for line in script.splitlines() if line.startswith("ptq ")]
    assert own == listed[1:]
    assert [line.split()[1] for line in own] == ["calibrate", "quantize", "evaluate", "report"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
