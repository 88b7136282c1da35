"""`ptq report` and `ptq compare` as commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from ptq.cli.compare import compare
from ptq.cli.report import report
from ptq.errors import UsageError
from ptq.report.cells import Table
from ptq.report.compare import compare_sides, read_side

app = typer.Typer()
app.command()(report)
app.command()(compare)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_report_writes_what_was_asked_for(copy_job, tmp_path):
    result = run("report", copy_job.root, "--html", tmp_path / "x.html", "--videos", 0)
    assert result.exit_code == 0, result.output
    assert "the limit is" in result.output and list(tmp_path.glob("x.*")) == [tmp_path / "x.html"]
    assert b"<video" not in (tmp_path / "x.html").read_bytes()
    assert not list(copy_job.root.glob("report*"))


def test_report_of_a_demo_with_two_formats_writes_two(copy_job, tmp_path):
    shutil.copytree(copy_job.evaluation, copy_job.root / "evaluation" / "again")
    refused = run("report", copy_job.root, "--pdf", tmp_path / "x.pdf")
    assert isinstance(refused.exception, UsageError) and not (tmp_path / "x.pdf").exists()
    result = run("report", copy_job.root, "--videos", 1, "--json")
    assert result.exit_code == 0, result.output
    assert [entry["html"] for entry in json.loads(result.stdout)] == [
        str(copy_job.root / f"report-{name}.html") for name in ("again", "hif4")
    ]
    assert (copy_job.root / "report-hif4.pdf").read_bytes().startswith(b"%PDF")


def test_compare_two_checkpoints(packed):
    result = run("compare", packed["hif4"], packed["mxfp4"], "--json")
    assert result.exit_code == 0, result.output
    tables = json.loads(result.stdout)["tables"]
    settings = {row["name"]: (row["a"]["text"], row["b"]["text"]) for row in tables["settings"]}
    assert settings["format"] == ("hif4", "mxfp4") and settings["high-precision blocks"] == ("none", "transformer:1")
    assert settings["recipe.scheme.transform"] == ("smoothed", "learned") and "recipe.solver.rounding" not in settings
    bits = next(row for row in tables["sizes"] if row["name"] == "bits per quantized value, scales included")
    assert (bits["a"]["values"], bits["b"]["values"]) == ([4.5], [4.25])
    absent = next(row for row in tables["errors"] if row["name"] == "denoiser output, transformer_2")
    assert absent["b"] == {"text": "not there", "values": []}


def test_compare_two_evaluations(job, copy_job):
    copy_job.edit(lambda c: c.update(verdict="INCONCLUSIVE"))
    copy_job.edit(lambda c: c["candidate"]["settings"].update(steps=5))
    tables: dict[str, Table] = {
        t.key: t for t in compare_sides(read_side(job.evaluation), read_side(copy_job.evaluation))
    }
    assert tables["gate"].texts[0] == ["verdict", job.content()["verdict"], "INCONCLUSIVE"]
    assert tables["settings"].texts == [["generation.steps", "4", "5"]]
    loss = job.content()["dimensions"]["shape"]["relative_loss"]
    shape = next(row for row in tables["dimensions"].rows if row[0].text == "shape")
    assert shape[1].values == (loss["value"], loss["low"], loss["high"])
    assert run("compare", job.evaluation, copy_job.evaluation).exit_code == 0


def test_compare_refuses_different_kinds(job, tmp_path):
    with pytest.raises(UsageError, match="different kinds"):
        compare_sides(read_side(job.evaluation), read_side(job.checkpoint))
    with pytest.raises(UsageError, match="neither"):
        read_side(tmp_path)


def test_nothing_heavy_is_imported_before_a_command_runs():
    heavy = ("torch", "matplotlib", "av", "typst", "jinja2")
    code = f"import sys, ptq.cli.report, ptq.cli.compare, ptq.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
