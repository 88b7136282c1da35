"""Consoles, messages and tables. Results go to stdout, everything else to stderr, so that `--json` stays clean.

Every text passes `clean` here; nothing else in the package prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
"""Characters that a first column can be read in, and those of a column's margins and rule."""


def info(message: str) -> None:
    """One line about what happens."""
    stderr.print(escape(clean_message(message)), soft_wrap=True)


def warn(message: str) -> None:
    """One paragraph the user should not miss; the work goes on."""
    stderr.print(f"[yellow]Warning:[/yellow] {escape(clean_message(message))}", soft_wrap=True)


def error(message: str) -> None:
    """The paragraph that a command ends with."""
    stderr.print(f"[bold red]Error:[/bold red] {escape(clean_message(message))}", soft_wrap=True)


def plain(text: str) -> None:
    """Lines of any length on stderr as they are: a traceback."""
    stderr.out(clean(text), highlight=False)


def say(text: str, lead: str = "", style: str = "bold") -> None:
    """A sentence of the result, on stdout; `lead` stands before it in a style of rich."""
    start = f"[{style}]{escape(clean(lead))}[/]" if lead else ""
    console.print(f"{start}{escape(clean(text))}", soft_wrap=True)


def details(title: str, values: Mapping[str, object]) -> None:
    """Print named values to stdout, one a line."""
    result = Table(title=escape(clean(title)), title_justify="left", show_header=False)
    for name, value in values.items():
        result.add_row(escape(clean(name)), escape(clean(str(value))))
    console.print(result)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = True) -> None:
    """Print a result table to stdout; the first column is left-aligned, the others right-aligned if they are `numbers`.

    Where the others fit beside a narrow first column, only that one is broken over lines.
    """
    texts = [[clean(str(cell)) for cell in row] for row in rows]
    lengths = [max(map(len, cells)) for cells in zip(columns, *texts, strict=True)]
    fits = _NARROW + sum(lengths[1:]) + _RULED * len(columns) < console.width
    result = Table(title=escape(clean(title)), title_justify="left")
    for index, column in enumerate(columns):
        right = numbers and index > 0
        result.add_column(
            escape(clean(column)), justify="right" if right else "left", overflow="fold", no_wrap=right and fits
        )
    for row in texts:
        result.add_row(*map(escape, row))
    console.print(result)
