"""Consoles, messages and tables. Results go to stdout, everything else to stderr, so that `--json` stays clean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)
_NARROW, _RULED = 9, 3
"""Characters that a first column can be read in, and those of a column's margins and rule."""


def info(message: str) -> None:
    """One line about what happens."""
    stderr.print(escape(message), soft_wrap=True)


def warn(message: str) -> None:
    """One paragraph the user should not miss; the work goes on."""
    stderr.print(f"[yellow]Warning:[/yellow] {escape(message)}", soft_wrap=True)


def details(title: str, values: Mapping[str, object]) -> None:
    """Print named values to stdout, one a line."""
    result = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        result.add_row(escape(name), escape(str(value)))
    console.print(result)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a result table to stdout; the first column is left-aligned, the others right-aligned.

    Where the others fit beside a narrow first column, only that one is broken over lines.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    lengths = [max(map(len, cells)) for cells in zip(columns, *texts, strict=True)]
    fits = _NARROW + sum(lengths[1:]) + _RULED * len(columns) < console.width
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numbers = index > 0
        result.add_column(column, justify="right" if numbers else "left", overflow="fold", no_wrap=numbers and fits)
    for row in texts:
        result.add_row(*map(escape, row))
    console.print(result)
