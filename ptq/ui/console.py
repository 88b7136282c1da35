"""Consoles, messages and tables. Results go to stdout, everything else to stderr, so that `--json` stays clean."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

_events_path: Path | None = None


def set_events(path: str | Path | None) -> None:
    """Also append every message and progress step to this JSONL file (None: stop)."""
    global _events_path
    _events_path = None if path is None else Path(path)


def emit(kind: str, **fields: Any) -> None:
    """Append one event line where an events file is set."""
    if _events_path is not None:
        with open(_events_path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"time": time.time(), "event": kind, **fields}, ensure_ascii=False) + "\n")


def info(message: str) -> None:
    """One line about what happens."""
    stderr.print(escape(message), soft_wrap=True)
    emit("info", message=message)


def warn(message: str) -> None:
    """One paragraph the user should not miss; the work goes on."""
    stderr.print(f"[yellow]Warning:[/yellow] {escape(message)}", soft_wrap=True)
    emit("warning", message=message)


def facts(title: str, values: Mapping[str, object]) -> None:
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
