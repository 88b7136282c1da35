"""An honest archive holds and says what nobody checked; members, source and weights that were changed are found."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from submission_helpers import (
    EVALUATION,
    MANIFEST,
    SHOWN,
    TEXTS,
    TOGETHER,
    UNIT,
    UNITS,
    by_name,
    redo_all,
    redo_crc,
    relabel,
)
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.submission.check import Claim
from ptq.submission.verify import verify
from ptq.wan.identity import identify_model

CONSOLE = importlib.import_module("ptq.ui.console")  # `ptq.ui.console` is also a name in `ptq.ui`


def test_an_honest_archive_holds_and_lists_what_nobody_checked(archive: Path) -> None:
    claims = verify(archive, max_bytes=10**9)
    assert [claim for claim in claims if claim.holds is False] == []
    found = by_name(claims)
    assert found[UNIT].holds and "of the original model; both measured again" in found[UNIT].found
    assert found[SHOWN].found == "4 of 4 units"
    assert {claim.name for claim in claims if claim.holds is None} == {
        "both runs have the model's own settings",
        "the prompts are those of the challenge",
        "errors, times, versions and names in manifest and runs",
        "text and pictures of the report",
    }
    assert found["both runs have the model's own settings"].found.startswith("both runs have steps 3 (the model's own ")
    assert all((claim.holds is None) == (claim.how == "not checked") for claim in claims)


def test_the_command_lists_every_claim_and_fails_when_one_does_not_hold(
    archive: Path, tampered, tmp_path: Path, monkeypatch
) -> None:
    result = CliRunner().invoke(app, ["verify", str(archive), "--no-regenerate", "--json"])
    assert result.exit_code == 0, result.output
    listed = json.loads(result.stdout)
    assert {tuple(one) for one in listed} == {("name", "how", "holds", "found")}
    assert by_name([Claim(**one) for one in listed])[UNIT].found == "--no-regenerate"
    monkeypatch.setattr(CONSOLE, "console", Console(file=(stream := io.StringIO()), width=150))
    assert CliRunner().invoke(app, ["verify", str(archive), "--no-regenerate"]).exit_code == 0
    assert "│ the members are those of a submission" in stream.getvalue()  # and not a few letters a line
    from ptq.submission.archive import write_archive

    tampered.write("README.md", b"All is well.\n")
    tampered.redo_checksums()
    write_archive(tmp_path / "bad.tar.gz", {name: tampered.root / name for name in tampered.names()})
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "bad.tar.gz"), "--json"])
    assert result.exit_code == 1
    claims = by_name([Claim(**one) for one in json.loads(result.stdout)])
    assert claims[TEXTS].holds is False and claims[UNIT].holds is None and "not tried" in claims[UNIT].found


def test_a_replaced_source(tampered) -> None:
    tampered.write("source/ptq/rules.py", b"import os\n")
    problem = tampered.problems()["the source is that of the package"]
    assert "1 files of source/" in problem and "source/ptq/rules.py" in problem


def test_source_added_and_removed(tampered) -> None:
    tampered.write("source/ptq/backdoor.py", b"import os\n")
    (tampered.root / "source/ptq/limits.py").unlink()
    assert "2 files of source/" in tampered.problems()["the source is that of the package"]


def test_another_calibration(tampered) -> None:
    tampered.edit("calibration/calibration.json", lambda info: info.update(seed=99))
    tampered.redo_derived()
    assert "its digest is" in tampered.problems()["the calibration is the one of the manifest"]


def test_a_flipped_byte_in_any_kind_of_member(tampered) -> None:
    from ptq.submission.members import check_checksums

    for name in ("weights/vae/config.json", UNITS, "report/report.pdf", "source/ptq/version.py"):
        data = bytearray((tampered.root / name).read_bytes())
        data[len(data) // 2] ^= 1
        tampered.write(name, bytes(data))
        with pytest.raises(Exception, match="was changed: its sha256"):
            check_checksums(tampered.contents())
        data[len(data) // 2] ^= 1
        tampered.write(name, bytes(data))
    check_checksums(tampered.contents())


@pytest.mark.parametrize(
    "name", ["report/report.pdf", UNITS, "reproduce.sh", "weights/vae/config.json", "runs/reference/run.json"]
)
def test_a_removed_member(tampered, name: str) -> None:
    (tampered.root / name).unlink()
    problems = tampered.problems()
    assert any("missing" in problem or "does not exist" in problem for problem in problems.values())


def test_one_video_removed(tampered) -> None:
    next((tampered.root / "runs/candidate/videos").iterdir()).unlink()
    assert "missing: runs/candidate/videos" in tampered.problems()["the members are those of a submission"]


@pytest.mark.parametrize("name", ["extra.txt", "runs/candidate/notes.md", "evaluation/better.json", "source/setup.py"])
def test_an_unexpected_member(tampered, name: str) -> None:
    tampered.write(name, b"x")
    problems = tampered.problems()
    assert f"{name} does not belong in a submission" in problems["the members are those of a submission"]


@pytest.mark.parametrize(
    "name", ["text_encoder/pytorch_model.bin", "install.sh", "tokenizer/x.pyc", "vae/extra.h5", ".hidden.json"]
)
def test_code_among_the_weights(tampered, name: str) -> None:
    tampered.write(f"weights/{name}", b"{}")
    tampered.redo_manifest()
    assert f"{name} does not belong among weights" in tampered.problems()["the members are those of a submission"]


def test_an_archive_without_videos_says_so(tampered) -> None:
    for role in ("reference", "candidate"):
        for folder in ("videos", "latents", "frames"):
            shutil.rmtree(tampered.root / "runs" / role / folder)
    tampered.redo_checksums()
    from ptq.submission.verify import check_contents

    claims = by_name(check_contents(tampered.contents(), regenerate=False))
    assert not [claim for claim in claims.values() if claim.holds is False]
    assert claims[SHOWN].holds is None and "not in the archive" in claims[SHOWN].found


def test_weights_of_another_checkpoint(tampered) -> None:
    tampered.edit("weights/scheduler/scheduler_config.json", lambda config: config.update(flow_shift=9.0))
    tampered.redo_manifest()
    assert "is of a checkpoint with digest" in tampered.problems()[TOGETHER]


def test_weights_swapped_and_all_digests_with_them(tampered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every digest fits again: only generating a unit tells."""
    from ptq.checkpoint.safetensors_file import read_header

    file = next((tampered.root / "weights/transformer").glob("*.safetensors"))
    entry = next(e for n, e in read_header(file).items() if n.endswith("proj_out.weight") or n.endswith("weight_scale"))
    data = bytearray(file.read_bytes())
    data[entry.start : entry.start + 8] = bytes(8)
    tampered.write(file.relative_to(tampered.root).as_posix(), bytes(data))
    redo_crc(tampered, file)
    tampered.redo_manifest()
    relabel(tampered, "candidate", identify_model("x", tampered.root / "weights").digest)
    redo_all(tampered)
    problems = tampered.problems(regenerate=True)
    assert (
        list(problems) == [UNIT]
        and "of the candidate: final_latents_sha256, saved_frames_sha256, video_sha256 differ" in problems[UNIT]
    )


def test_another_component_besides_the_experts(tampered) -> None:
    """Generated, evaluated and packed honestly: but then the videos differ by more than the quantized weights."""
    tampered.edit("weights/scheduler/scheduler_config.json", lambda config: config.update(flow_shift=9.0))
    tampered.redo_manifest()
    relabel(tampered, "candidate", identify_model("x", tampered.root / "weights").digest)
    redo_all(tampered)
    problems = tampered.problems()
    assert list(problems) == ["the reference run is of the original model"]
    assert "weights/scheduler/scheduler_config.json is not as in tiny" in next(iter(problems.values()))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("weights/transformer/config.json", {"num_layers": 10**9}, "num_layers = 1e+09"),
        ("weights/transformer/config.json", {"ffn_dim": 10**12}, "ffn_dim = 1e+12"),
        ("weights/text_encoder/config.json", {"num_layers": 10**9}, "num_layers = 1e+09"),
        ("weights/vae/config.json", {"base_dim": 10**15}, "base_dim = 1e+15"),
        ("weights/transformer/config.json", {"num_layers": 5}, '"num_layers": 6, but'),
    ],
    ids=str,
)
def test_numbers_that_would_take_for_ever(tampered, name: str, change: dict[str, Any], reason: str) -> None:
    tampered.edit(name, lambda config: config.update(change))
    tampered.redo_manifest()
    assert any(reason in problem for problem in tampered.problems().values())


@pytest.mark.parametrize(
    "name",
    [
        EVALUATION,
        UNITS,
        "runs/candidate/run.json",
        MANIFEST,
        "submission.json",
        "weights/model_index.json",
        "calibration/calibration.json",
    ],
)
@pytest.mark.parametrize(
    "data",
    [b"null", b'{"candidate": null}', b"[" * 100_000, b"1" * 10_000],
    ids=range(4),
)
def test_malformed_members_are_answers_and_not_tracebacks(tampered, name: str, data: bytes) -> None:
    tampered.write(name, data)
    problems = tampered.problems()
    assert problems and all(len(text) < 3000 for text in problems.values())
