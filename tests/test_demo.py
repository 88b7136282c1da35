"""`ptq demo` on both embedded models: every stage, both formats, and an archive whose contents hold."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import UsageError


@pytest.mark.parametrize("model", ["tiny", "tiny-i2v"])
def test_the_whole_job(model: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--model", model, "--units", "2", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == {"hif4", "mxfp4"}
    runs = {path.name: (path / "manifest-0of1.jsonl").read_text() for path in (out / "videos").iterdir()}
    assert set(runs) == {"original", "hif4", "mxfp4"}
    lines = {name: [json.loads(line) for line in text.splitlines()] for name, text in runs.items()}
    keys = ("unit", "seed", "latent_sha256", "image_sha256")
    paired = {name: [tuple(line[key] for key in keys) for line in found] for name, found in lines.items()}
    assert paired["original"] == paired["hif4"] == paired["mxfp4"] and len(paired["original"]) == 2
    assert all((image is not None) == (model == "tiny-i2v") for *_, image in paired["original"])
    for name in ("hif4", "mxfp4"):
        assert len(list((out / "side-by-side" / name).glob("*.mp4"))) == 2
        results = out / "results" / name
        assert {path.name for path in results.iterdir()} == {"report.html", "report.pdf", "submission.tar.gz"}


def test_an_unknown_model_is_refused() -> None:
    result = CliRunner().invoke(app, ["demo", "--model", "huge"])
    assert isinstance(result.exception, UsageError) and "tiny or tiny-i2v" in str(result.exception)
