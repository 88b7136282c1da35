"""`ptq demo` on the embedded models: every stage, plain rounding and both formats, and an archive whose contents hold."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import UsageError


@pytest.mark.slow
@pytest.mark.parametrize(("model", "formats"), [("tiny-outliers", ["hif4", "mxfp4"]), ("tiny-i2v", ["mxfp4"])])
def test_the_whole_job(model: str, formats: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq.cli.demo_job.CALIBRATION_PROMPTS", 4)
    out = tmp_path / "demo"
    arguments = ["demo", "--model", model, "--units", "2", "--out", str(out), "--json"]
    if len(formats) == 1:
        arguments += ["--format", formats[0]]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == {"rtn", *formats}
    runs = {path.name: (path / "manifest-0of1.jsonl").read_text() for path in (out / "videos").iterdir()}
    assert set(runs) == {"original", "rtn", *formats}
    lines = {name: [json.loads(line) for line in text.splitlines()] for name, text in runs.items()}
    keys = ("unit", "seed", "latent_sha256", "image_sha256")
    paired = {name: [tuple(line[key] for key in keys) for line in found] for name, found in lines.items()}
    assert all(units == paired["original"] for units in paired.values()) and len(paired["original"]) == 2
    assert all((image is not None) == (model == "tiny-i2v") for *_, image in paired["original"])
    assert not (out / "results" / "rtn").exists()
    assert (out / "picture.png").stat().st_size > 10_000
    for name in formats:
        assert len(list((out / "side-by-side" / name).glob("*.mp4"))) == 2
        results = out / "results" / name
        assert {path.name for path in results.iterdir()} == {"report.html", "report.pdf", "submission.tar.gz"}


def test_an_unknown_model_is_refused() -> None:
    result = CliRunner().invoke(app, ["demo", "--model", "huge"])
    assert isinstance(result.exception, UsageError) and "tiny-outliers, tiny or tiny-i2v" in str(result.exception)


def test_the_picture_has_a_row_a_run_and_no_more_columns_than_fit(tmp_path: Path) -> None:
    """White, grey and black runs of ten units: each row of the picture has its run's colour, in eight columns."""
    import numpy as np
    from PIL import Image

    from ptq.report.picture import COLUMNS, write_picture

    runs = {}
    for label, grey in (("original", 255), ("rtn", 128), ("hif4", 0)):
        folder = tmp_path / label / "frames"
        folder.mkdir(parents=True)
        for unit in range(10):
            np.savez(folder / f"{unit}.npz", frames=np.full((3, 8, 8, 3), grey, dtype=np.uint8))
        runs[label] = folder.parent
    write_picture(runs, tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("L"))
    height, width = pixels.shape
    rows = [pixels[int(height * (row + 0.5) / 3)] for row in range(3)]
    frames = slice(width // 5, None)  # right of the labels
    assert [int(np.median(row[frames])) for row in rows] == [255, 128, 0]
    gaps = np.diff((rows[2][frames] > 200).astype(int)) == 1
    assert gaps.sum() == COLUMNS - 1
