"""Consoles, messages and tables. Results go to stdout, everything else to stderr, so that `--json` stays clean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


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
    """Print a result table to stdout; the first column is left-aligned, the others right-aligned."""
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*(escape(str(cell)) for cell in row))
    console.print(result)
