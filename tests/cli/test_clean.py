"""Control characters of others are shown, never obeyed; nothing prints but `ptq.ui`."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptq import ui
from ptq.cli.common import print_json
from ptq.ui.clean import LONGEST

NASTY = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil\u2066\r\x00\x7f\udcff"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil\u2066\r\x00\x7f\udcff"
PACKAGE = Path(ui.__file__).parents[1]


def test_all_else_stays():
    text = "tab\t, line\n, é 中文 🎈 e\u0301 [bold] \\x1b"
    assert ui.clean(text) == text


@pytest.mark.parametrize(
    "show",
    [
        ui.info,
        ui.warn,
        ui.error,
        ui.plain,
        ui.say,
        lambda text: ui.say("", text),
        lambda text: ui.details(text, {text: text}),
        lambda text: ui.table(text, (text, text), [(text, text)]),
    ],
)
def test_nothing_passes_raw(show, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    show(NASTY)
    said = "".join(capsys.readouterr())
    assert "\\x1b[2J" in said and "\\u202e" in said
    assert not set("\x1b\x07\x9b\u202e\u2066\r\x00\x7f\udcff") & set(said)


def test_progress_on_a_terminal_and_in_a_file(capsys):
    with ui.progress(NASTY, 1) as bar:
        bar.advance(note=NASTY)
    assert f"{SHOWN}: 1/1" in capsys.readouterr().err
    import io

    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TextColumn

    from ptq.ui.progress import Progress

    screen = io.StringIO()
    columns = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    with RichProgress(*columns, console=Console(file=screen, force_terminal=True, width=300)) as rich:
        Progress(NASTY, 2, rich).advance(note=NASTY)
    assert screen.getvalue().count("title") >= 2
    assert "\x1b[2J" not in screen.getvalue() and "\x1b]0;" not in screen.getvalue()


def test_a_message_is_cut_in_its_middle(capsys):
    ui.warn("start" + "x" * 10 * LONGEST + "end")
    said = capsys.readouterr().err
    assert len(said) < LONGEST + 200 and "start" in said and said.endswith("end\n") and "left out" in said


def test_json_keeps_its_value(capsys):
    value = {NASTY: [NASTY, "é", 1]}
    print_json(value)
    said = capsys.readouterr().out
    assert json.loads(said) == value and not set("\x1b\x07\x9b\u202e\u2066\r\x00\x7f\udcff") & set(said)


def test_the_page_shows_and_does_not_obey():
    import jinja2
    from markupsafe import Markup

    from ptq.report.html import _harmless

    environment = jinja2.Environment(autoescape=True, finalize=_harmless)
    page = environment.from_string("{{ a }} {{ b }}").render(a=f"<i>{NASTY}", b=Markup("<b>\t</b>"))
    assert page == f"&lt;i&gt;{SHOWN} <b>\t</b>"


def test_only_ui_prints():
    for path in PACKAGE.rglob("*.py"):
        if PACKAGE / "ui" in path.parents or path.name in ("driver.py", "common.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("print", "out", "print_json"):
                owner = ast.unparse(node.value)
                assert owner not in ("ui.console", "ui.stderr", "console", "stderr"), f"{path}:{node.lineno}"


def test_colons_are_text():
    """rich would make an emoji of it, from a table that it opens when the first text is shown; before 15.0, when it is imported."""
    code = "import sys, rich.console\nbefore = 'rich._emoji_codes' in sys.modules\nfrom ptq import ui\nui.error('a :smile: ring')\nui.details('t', {'k': ':smile:'})\nassert ('rich._emoji_codes' in sys.modules) == before"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "a :smile: ring" in result.stderr and ":smile:" in result.stdout, result.stderr
