"""units.jsonl of an evaluation directory: one line a unit, its scores in both runs and how far the two are apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ptq.store.files import append_jsonl, write_jsonl
from ptq.store.schema import Number, Schema, parse_lines

FILE = "units.jsonl"
Role = Annotated[str, Field(pattern="^(reference|candidate)$")]


class Hashes(Schema):
    """SHA-256 over the pixels of both videos."""

    reference: str
    candidate: str


class UnitLine(Schema):
    """One unit. Values are None where a measure is undefined.

    inputs: digest of what was measured, and how. source: saved frames or decoded video. measured: digest of the line as it
    was measured, before the scores of VBench came to it. These and `hashes` are absent
    where only VBench results were read. replaced: what was measured in places that VBench's values of the same name have now,
    so that the next evaluation need not measure again; absent where there is none.
    """

    unit: str
    inputs: str | None = None
    source: str | None = None
    reference: dict[str, Number | None]
    candidate: dict[str, Number | None]
    paired: dict[str, Number | None]
    hashes: Hashes | None = None
    measured: str | None = None
    replaced: dict[Role, dict[str, Number | None]] = {}

    def of(self, role: str) -> dict[str, int | float | None]:
        """Scores of one run: dimension -> value."""
        return self.reference if role == "reference" else self.candidate

    def merged(self, scores: Mapping[str, Mapping[str, int | float | None]]) -> UnitLine:
        """This line with further scores (role -> dimension -> value); values of its own that these replace are kept aside."""
        replaced = {
            role: {name: own for name, own in self.of(role).items() if name in new and new[name] != own}
            for role, new in scores.items()
        }
        aside = {role: values for role, values in replaced.items() if values}
        both = {role: {**self.of(role), **new} for role, new in scores.items()}
        return self.model_copy(update=both | ({"replaced": aside} if aside else {}))


def read_units(directory: Path, *, skip_damaged: bool = False) -> list[UnitLine]:
    """All lines; [] where there is no file.

    Args:
        skip_damaged: leave damaged lines out instead of refusing the file.

    Raises:
        DamagedFileError: names the line and what is wrong with it.
    """
    advice = "Run `ptq evaluate` again into that directory."
    return parse_lines(UnitLine, directory / FILE, advice, skip_damaged=skip_damaged)


def append_unit(directory: Path, line: UnitLine) -> None:
    """Add one line and flush it to disk."""
    append_jsonl(directory / FILE, line.as_json())


def write_units(directory: Path, lines: Iterable[UnitLine]) -> None:
    """Rewrite the file atomically with these lines only."""
    write_jsonl(directory / FILE, (line.as_json() for line in lines))
