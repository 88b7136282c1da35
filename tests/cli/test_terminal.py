"""What a terminal of 80 or 120 columns shows: help without a cut word, tables without a cut number."""

import importlib
import io
import re

import pytest
import typer.main
from rich.console import Console

from ptq import ui
from ptq.cli.main import app

CONSOLE = importlib.import_module("ptq.ui.console")  # `ptq.ui.console` is also a name in `ptq.ui`
LONG = "transformer_2.blocks.39.attn2.to_out.0 of /a/directory/with/a/long/name"
TABLES = {
    "demo": (
        ("recipe", "verdict", "loss, 95 % interval", "limit", "packed"),
        [("rtn (hif4)", "INCONCLUSIVE", "+100.04 % [-105.89, +154.30]", "0.5%", "999.9 MB")],
    ),
    "inspect": (
        ("layer", "shape", "basis", "weight SQNR", "rtn error", "error"),
        [(LONG, "13824x5120", "learned 64", "-10.2 dB", "1.25e-02", "1.26e-03")],
    ),
    "status": (
        ("shard", "state", "done", "of", "failed", "videos/hour", "s/video", "in work"),
        [("1024/2048", "running", 123456, 234567, 34567, "1234.5", "45678.9", "held-out/b9c14859d6b1/0")],
    ),
    "bench": (
        ("candidate", "median ms", "best ms", "Melem/s", "GB/s", "x torchao"),
        [("ptq hif4, quantize + pack", "12345.678", "12345.123", "98765.4", "1234.5", "1234.56")],
    ),
    "many numbers": (tuple(f"column{i}" for i in range(9)), [tuple(f"-{i}.2345678e+10" for i in range(9))]),
}


@pytest.fixture
def shown(monkeypatch):
    def show(width, columns, rows):
        stream = io.StringIO()
        monkeypatch.setattr(CONSOLE, "console", Console(file=stream, width=width, highlight=False, emoji=False))
        ui.table("A title", columns, rows)
        return stream.getvalue()

    return show


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_no_table_cuts_a_number_or_a_heading(name, width, shown) -> None:
    columns, rows = TABLES[name]
    text = shown(width, columns, rows)
    assert all(len(line) <= width for line in text.splitlines() if "│" in line), text
    words = {word for line in text.splitlines() for word in re.split(r"[\s│┃]+", line)}
    for cell in rows[0]:
        for word in str(cell).split():
            assert word in words or not re.fullmatch(r"[\[+-]*\d[^a-z/]*(e[+-]\d+)?\]?,?", word), f"{word} in\n{text}"
    assert "…" not in text
    letters = re.sub(r"[\s│┃:]+", "", text)
    assert all(word in words or word in letters for column in columns for word in column.split())
    assert LONG not in rows[0] or "transformer_2" in letters


def test_a_table_that_fits_nowhere_becomes_lines(shown) -> None:
    columns, rows = TABLES["many numbers"]
    assert "column8: -8.2345678e+10" in shown(80, columns, rows).splitlines()


def test_beside_words_the_widest_column_gives_way(monkeypatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(CONSOLE, "console", Console(file=stream, width=80, highlight=False, emoji=False))
    ui.table(
        "Prompts", ("id", "prompt"), [("531944600b51", "a little lemon disk glides to the top " * 3)], numbers=False
    )
    assert "│ 531944600b51 │" in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("write", [ui.info, ui.warn, ui.error, ui.say])
def test_on_a_terminal_lines_of_a_sentence_end_between_words(monkeypatch, write, terminal) -> None:
    path = "/a/path/that/is/longer/than/a/line/of/forty/columns/x.tar.gz"
    message = f"Some prompts [of {path}] were left out: transformer_2.blocks.39 has other-settings."
    stream = io.StringIO()
    for name in ("console", "stderr"):
        shown = Console(file=stream, width=40, highlight=False, emoji=False, force_terminal=terminal, no_color=True)
        monkeypatch.setattr(CONSOLE, name, shown)
    write(message)
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert " ".join(text.split()).endswith(message)
    lines = text.splitlines()
    assert (
        len(lines) == 1 if not terminal else all(len(line) <= 40 or path in line for line in lines) and len(lines) > 3
    )


def test_named_values_are_folded_not_cut(monkeypatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(CONSOLE, "console", Console(file=stream, width=40))
    ui.details("A title", {"sha256": "0123456789abcdef" * 4})
    assert "0123456789abcdef" * 4 in re.sub(r"[\s│]+", "", stream.getvalue())


def test_a_bar_of_80_columns_shows_counts_time_left_and_the_whole_note(monkeypatch) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(importlib.import_module("ptq.ui.progress"), "stderr", terminal)
    with ui.progress("Generating shard 12/32", 12345) as bar:
        bar.advance(12344, note="video 1234/1235, step 10/10, 125s left of this video")
    last = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", stream.getvalue()).rsplit("Generating", 1)[1]
    assert "12344/12345" in last and re.search(r"\d:\d\d:\d\d left|-:--:-- left", last), last
    words = last.split()
    assert "…" not in last and {"1234/1235,", "10/10,", "125s"} <= set(words), last


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_group(app)))


@pytest.fixture
def help_of(monkeypatch, capsys):
    """A function: (path of a command, width) -> its help in a terminal of that width; typer's runner has 80 columns always."""

    def show(path, width):
        for name in ("COLUMNS", "TERMINAL_WIDTH"):
            monkeypatch.setenv(name, str(width))
        typer.main.get_command(app).main([*path, "--help"], prog_name="ptq", standalone_mode=False)
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_keeps_words_whole(path, width, help_of) -> None:
    """Lines end between words, so that every word of the help texts is found whole, hyphens and all."""
    output = help_of(path, width)
    assert all(len(line) <= width for line in output.splitlines())
    assert "\u2011" not in output and "…" not in output
    words = set(output.split())
    command = COMMANDS[path]
    texts = [command.help or "", *(getattr(one, "help", None) or "" for one in command.params)]
    missing = [word for text in texts for word in text.split() if word not in words]
    assert not missing, f"{missing} in\n{output}"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("path", [(), ("bench",)])
def test_the_list_of_commands_has_whole_sentences_in_the_whole_width(path, width, help_of) -> None:
    output = help_of(path, width)
    assert "..." not in output.replace("[ARGS]...", "")
    assert width - 20 < max(map(len, output.splitlines())) <= width
    words = " ".join(output.split())
    for name, command in COMMANDS.items():
        if name[:-1] == path:
            assert f"{name[-1]} {' '.join(command.help.split()).partition('. ')[0].rstrip('.')}." in words


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_no_limits_that_nobody_meets_and_no_types_of_python(path, help_of) -> None:
    output = help_of(path, 120)
    assert not re.search(r"\d{9}|list\[|Path", output), output
