"""Consoles, messages and tables. Results go to stdout, everything else to stderr, so that `--json` stays clean.

Every text passes `clean` here; nothing else in the package prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from textwrap import TextWrapper
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ptq.ui.clean import clean, clean_message

NARROWEST = 20
"""Columns that a table takes at least, whatever COLUMNS says: with 0, which some terminals report, rich prints nothing."""


def make_console(*, stderr: bool = False) -> Console:
    """A console of standard output or error that is at least `NARROWEST` wide."""
    # No emoji: ":ring:" in a prompt is text, and their table is a file that an error for want of files could not open.
    found = Console(stderr=stderr, highlight=False, emoji=False)
    return found if found.width >= NARROWEST else Console(stderr=stderr, highlight=False, emoji=False, width=NARROWEST)


console = make_console()
stderr = make_console(stderr=True)
_NARROW, _RULED = 9, 3
"""Characters that a column of words can be read in, and those of a column's margins and rule."""
_NUMBER = re.compile(r"[\[(]?[-+]?\d[\d.,:eEx%+-]*[\])]?,?")
"""A word of a cell that must stay whole."""


def info(message: str) -> None:
    """One line about what happens."""
    _sentence(stderr, clean_message(message))


def warn(message: str) -> None:
    """One paragraph the user should not miss; the work goes on."""
    _sentence(stderr, f"Warning: {clean_message(message)}", "yellow", len("Warning:"))


def error(message: str) -> None:
    """The paragraph that a command ends with."""
    _sentence(stderr, f"Error: {clean_message(message)}", "bold red", len("Error:"))


def plain(text: str) -> None:
    """Lines of any length on stderr as they are: a traceback."""
    stderr.out(clean(text), highlight=False)


def say(text: str, lead: str = "", style: str = "bold") -> None:
    """A sentence of the result, on stdout; `lead` stands before it in a style of rich."""
    _sentence(console, clean(lead) + clean(text), style, len(clean(lead)))


def _sentence(target: Console, text: str, style: str = "", styled: int = 0) -> None:
    """Print text, its first `styled` characters in a style of rich.

    On a terminal lines end between words, and a word that is longer than a line (a path, to be copied) stays whole; in a file a
    message is one line.
    """
    if target.is_terminal:
        words = TextWrapper(target.width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
        text = "\n".join(words.fill(line) for line in text.split("\n"))
    shown = Text(text)
    shown.stylize(style, 0, styled)
    target.print(shown, soft_wrap=True)


def details(title: str, values: Mapping[str, object]) -> None:
    """Print named values to stdout, one a line."""
    result = Table(title=escape(clean(title)), title_justify="left", show_header=False)
    for _ in range(2):
        result.add_column(overflow="fold")
    for name, value in values.items():
        result.add_row(escape(clean(name)), escape(clean(str(value))))
    console.print(result)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = True) -> None:
    """Print a result table to stdout; the first column is left-aligned, the others right-aligned if they are `numbers`.

    Where it is too wide the first column is broken over lines, where there are numbers beside it, then the widest, but no number
    and no heading. Where that is not enough the rows are printed as lines, one a cell.
    """
    texts = [[clean(str(cell)) for cell in row] for row in rows]
    headings = [clean(column) for column in columns]
    room = console.width - _RULED * len(columns) - 1
    widths = _widths(list(zip(headings, *texts, strict=True)), room, first=numbers)
    if widths is None:
        say(clean(title))
        for row in texts:
            say("")
            for heading, cell in zip(headings, row, strict=True):
                say(cell, lead=f"{heading}: ", style="dim")
        return
    result = Table(title=escape(clean(title)), title_justify="left")
    for index, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        justify: Literal["left", "right"] = "right" if numbers and index > 0 else "left"
        result.add_column(escape(heading), justify=justify, overflow="fold", width=width)
    for row in texts:
        result.add_row(*map(escape, row))
    console.print(result)


def _widths(columns: Sequence[Sequence[str]], room: int, *, first: bool) -> list[int] | None:
    """Characters of each column (its heading, then its cells), `room` at most together; None where they do not fit.

    first: the first column gives way before the others.
    """
    widths = [max(map(cell_len, cells)) for cells in columns]
    least = [
        max(
            [
                min(_NARROW, width),
                *(cell_len(word) for word in cells[0].split()),
                *(cell_len(word) for cell in cells[1:] for word in cell.split() if _NUMBER.fullmatch(word)),
            ]
        )
        for width, cells in zip(widths, columns, strict=True)
    ]
    if sum(least) > room:
        return None
    if first:
        widths[0] = max(least[0], widths[0] - max(0, sum(widths) - room))
    while sum(widths) > room:
        widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
        widths[widest] -= 1
    return widths
