"""Tables as data: text for people beside the raw numbers, so that the page, the PDF and the terminal show the same.

A `Cell` carries the values its text was made from; the HTML writes them as `data-value`, which is what the tests compare
with evaluation.json. No file is read here and nothing is computed but the rounding of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq.store.evaluation import Estimate
from ptq.ui import format_bytes

MINUS = "\u2212"
NONE = "not measured"
_FLAGS = {True: "yes", False: "no", None: "default"}


@dataclass(frozen=True)
class Cell:
    """One cell. `values`: the numbers behind the text (value, or value, low, high); empty for words."""

    text: str
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """A finished table. `key` names it in code and in the page; `note` is one sentence below it."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    @classmethod
    def of(
        cls, key: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell | str]], note: str = ""
    ) -> Table:
        """A table whose words may be given as plain strings."""
        cells = tuple(tuple(c if isinstance(c, Cell) else Cell(c) for c in row) for row in rows)
        return cls(key, title, tuple(columns), cells, note)

    @property
    def texts(self) -> list[list[str]]:
        """Rows as strings."""
        return [[cell.text for cell in row] for row in self.rows]


def signed(value: float, digits: int) -> str:
    """A number with its sign, a real minus, and no negative zero."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", MINUS)


def plain(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits; scientific where that is shorter."""
    return f"{value:.{digits}g}".replace("-", MINUS)


def number(value: float | None, digits: int = 4) -> Cell:
    """A measured value, or the words that it is missing."""
    return Cell(NONE) if value is None else Cell(plain(value, digits), (float(value),))


def count(value: int) -> Cell:
    """A whole number with thin groups of three."""
    return Cell(f"{value:,}".replace(",", "\u202f"), (float(value),))


def share(value: float) -> Cell:
    """A share as percent."""
    return Cell(f"{100 * value:.2f} %", (value,))


def size(value: float) -> Cell:
    """Bytes as GB, MB or KB (powers of ten)."""
    return Cell(format_bytes(value, digits=2), (float(value),))


def error(value: float | None) -> Cell:
    """A relative squared error, and the same in dB (lower is better)."""
    if value is None:
        return Cell(NONE)
    if value <= 0:
        return Cell("0 (exact)", (value,))
    return Cell(f"{value:.2e} ({signed(10 * math.log10(value), 1)} dB)".replace("e-", f"e{MINUS}"), (value,))


def percent(estimate: Estimate | None, *, sign: int = 1) -> Cell:
    """An estimate as percent with its interval; `sign` -1 turns a loss into a change."""
    if estimate is None:
        return Cell("no ratio to 0")
    scale = 100.0 * sign
    value = f"{signed(scale * estimate.value, 2)} %"
    if estimate.low is None or estimate.high is None:
        return Cell(f"{value} [no interval]", (estimate.value,))
    low, high = sorted((scale * estimate.low, scale * estimate.high))
    return Cell(f"{value} [{signed(low, 2)}, {signed(high, 2)}]", (estimate.value, estimate.low, estimate.high))


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and short texts."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{name}.")
        elif isinstance(item, (list, tuple)):
            flat[name] = ", ".join(map(str, item)) or "none"
        else:
            flat[name] = _FLAGS[item] if item is None or isinstance(item, bool) else str(item)
    return flat
