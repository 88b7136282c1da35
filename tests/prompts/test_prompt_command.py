"""`ptq prompts`: the table for people and the JSON for machines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ptq.cli.prompts import prompts as command
from ptq.errors import UsageError


def run(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my [bold]prompts.json"
    records = [{"id": f"s{index}", "prompt": "[red]x" * (index + 1), "image": f"{index}.png"} for index in range(7)]
    path.write_text(json.dumps(records))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "2.png").write_bytes(b"x")
    return path


def test_json(file: Path) -> None:
    result = json.loads(run(file, "--media-root", file.parent / "pictures", "--json"))
    assert (result["format"], result["records"], result["samples"], result["excluded"]) == ("generic", 7, 7, 0)
    assert result["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert result["caption_chars"] == {"min": 6, "median": 24, "max": 42}
    assert (result["media"], result["missing"]) == ({"image": 7}, 6)
    assert result["missing_first"][0] == {"id": "s0", "path": "0.png"}
    assert [one["id"] for one in result["preview"]] == ["s0", "s1", "s2", "s3", "s4"]
    assert result["preview"][2]["resolved"] == str(file.parent / "pictures" / "2.png")
    assert result["resize_policy"] == "cover-center-crop-lanczos"


def test_options_reach_the_reader(file: Path, tmp_path: Path) -> None:
    banned = tmp_path / "banned.txt"
    banned.write_text("[RED]x[red]x\n")
    result = json.loads(run(file, "--exclude", banned, "--limit", 3, "--json"))
    assert [one["id"] for one in result["preview"]] == ["s0", "s2", "s3"]
    assert (result["samples"], result["excluded"]) == (3, 1)
    with pytest.raises(UsageError, match="no prompt format 'nothing'"):
        run(file, "--prompt-format", "nothing")


def test_table_shows_text_as_it_is(file: Path) -> None:
    shown = run(file, "--media-root", file.parent / "pictures")
    for part in ("generic", "6 min, 24 median, 42 max", "[red]x", "missing", "found"):
        assert part in shown


def test_everything_excluded_is_shown_not_hidden(file: Path) -> None:
    result = json.loads(run(file, "--exclude", file, "--json"))
    assert (result["samples"], result["excluded"], result["caption_chars"]) == (0, 7, None)
    assert "left out by --exclude" in run(file, "--exclude", file)
