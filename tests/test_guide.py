"""Every command and option that docs/guide.md shows exists."""

import re
from pathlib import Path

import pytest
import typer

from ptq.cli.main import app

ROOT = Path(__file__).resolve().parents[1]


def shown_commands() -> list[str]:
    """The `ptq ...` commands of the guide's code blocks, continuation lines joined, comments cut off."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [re.sub(r"^.*ptq\.cli\.main ", "ptq ", line) for line in lines if re.search(r"^ptq |ptq\.cli\.main ", line)]


@pytest.mark.parametrize("line", shown_commands())
def test_a_shown_command_exists_with_its_options(line: str):
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group, since there are several
    name, *words = line.split()[1:]
    command = commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = {word for word in words if word.startswith("--")}
    assert used <= known


def test_the_guide_shows_the_whole_way():
    assert {line.split()[1] for line in shown_commands()} >= {
        "prompts",
        "calibrate",
        "quantize",
        "generate",
        "evaluate",
    }
