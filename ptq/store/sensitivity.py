"""What measuring single blocks found: ptq_sensitivity.json of a checkpoint, protection.json while it is made."""

from __future__ import annotations

from pathlib import Path

from ptq.errors import DamagedFileError
from ptq.store.files import read_json, write_json
from ptq.store.schema import Count, NotNegative, PlainName, Schema, parse

SENSITIVITY_FILE = "ptq_sensitivity.json"
PROTECTION_FILE = "protection.json"


class Pick(Schema):
    """One protected block and the model's error before and after protecting it."""

    expert: PlainName
    block: Count
    before: NotNegative
    after: NotNegative


class BlockError(Schema):
    """Error of the model with only this block quantized."""

    expert: PlainName
    block: Count
    error: NotNegative


class SensitivityTable(Schema):
    """quantize_one: every block. picks: the choice, in order. comparison: choice -> error of the model."""

    metric: str
    quantize_one: list[BlockError]
    picks: list[Pick]
    comparison: dict[str, NotNegative]


def read_sensitivity(checkpoint: Path) -> SensitivityTable:
    """Raises:
    PtqError: the file does not exist. DamagedFileError: it is not one of this package."""
    path = checkpoint / SENSITIVITY_FILE
    return parse(SensitivityTable, read_json(path), path, "Quantize again, or delete it: reports do without.")


def write_sensitivity(checkpoint: Path, table: SensitivityTable) -> None:
    """Write ptq_sensitivity.json atomically."""
    write_json(checkpoint / SENSITIVITY_FILE, table.as_json())


def read_protection(work: Path) -> list[Pick]:
    """The blocks chosen in a work directory, in order; errors as `read_sensitivity`."""
    path = work / PROTECTION_FILE
    advice = "Delete it and run the same command again."
    content = read_json(path)
    if not isinstance(content, list):
        raise DamagedFileError(f"{path} does not hold a list of blocks. {advice}")
    return [parse(Pick, item, path, advice) for item in content]


def write_protection(work: Path, picks: list[Pick]) -> None:
    """Write protection.json atomically."""
    write_json(work / PROTECTION_FILE, [pick.as_json() for pick in picks])
