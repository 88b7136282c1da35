"""A progress bar with the time left; plain lines when stderr is not a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from ptq.ui.clean import clean
from ptq.ui.console import info, stderr

PLAIN_INTERVAL_S = 10.0
"""Where stderr is no terminal, a line at most this often."""
_BAR = 10
"""Characters of the bar: at 80 columns the note beside it is broken over two lines, and nothing is cut."""


class Progress:
    """Handle of one running task: call `advance` after each finished item."""

    def __init__(self, description: str, total: int, bar: RichProgress | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self._bar = bar
        self._task = bar.add_task(escape(clean(description)), total=total, note="") if bar else None
        self._start = self._last_line = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more items as done; `note` is a short remark shown behind the bar."""
        self.done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, note=escape(clean(note)))
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL_S or self.done == self.total:
            self._last_line = now
            left = (now - self._start) / max(self.done, 1) * (self.total - self.done)
            remark = f" ({note})" if note else ""
            info(f"{self.description}: {self.done}/{self.total}, {format_seconds(left)} left{remark}")


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Progress]:
    """Show progress for `total` items while the block runs."""
    if not stderr.is_terminal:
        yield Progress(description, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=_BAR),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(ratio=1, overflow="fold")),
    )
    with RichProgress(*columns, console=stderr, expand=True) as bar:
        yield Progress(description, total, bar)


def format_seconds(seconds: float) -> str:
    """Seconds as 42s, 3m 05s or 2h 10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def shorten(text: str, limit: int = 60) -> str:
    """The start of a text that is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit].rstrip()}..."


def format_bytes(count: float, digits: int = 1) -> str:
    """Bytes as 3.1 GB, 12.0 MB or 4.0 KB (powers of ten)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{int(count)} B"
