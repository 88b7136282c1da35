"""What the schemas of all artifacts share: strict keys and types, one paragraph for what does not fit, JSON as it was.

One file of this folder an artifact, named after it. Its writer and all its readers use that one model, so no stage has to
import another to read what the other wrote. A field that old files lack has a default; a key that nobody knows is an error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

from ptq.errors import DamagedFileError
from ptq.store.files import read_jsonl, write_json

SHOWN_PROBLEMS = 4


class Schema(BaseModel):
    """An artifact, or a part of one. Refused are unknown keys, "1" for 1, and NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)

    def as_json(self) -> dict[str, Any]:
        """The content of the file: keys in the order of the fields, without those that were never given."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(path, self.as_json())


def _finite(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("Input should be a finite number")
    return value


Number = Annotated[int | float, PlainValidator(_finite)]
"""A finite number that stays what it is: 3 is written as 3 and 3.0 as 3.0."""

AnySchema = TypeVar("AnySchema", bound=Schema)


def parse(schema: type[AnySchema], value: Any, path: Path, advice: str) -> AnySchema:
    """Check what was read from `path`; `advice` says what to do about a damaged file.

    Raises:
        DamagedFileError: names the file, the fields and what is wrong with them.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise DamagedFileError(
            f"{path} is not a file that this version can read: {problems(error)}. {advice}"
        ) from error


def parse_lines(schema: type[AnySchema], path: Path, advice: str, *, skip_damaged: bool = False) -> list[AnySchema]:
    """All lines of a JSONL file; [] where there is none. A torn last line (a writer was killed) is left out.

    Args:
        skip_damaged: leave out every damaged line instead of refusing the file.

    Raises:
        DamagedFileError: names the file, the line, the fields and what is wrong with them.
    """
    parsed = []
    for number, value in enumerate(read_jsonl(path, skip_damaged=skip_damaged), 1):
        try:
            parsed.append(schema.model_validate(value))
        except ValidationError as error:
            if not skip_damaged:
                raise DamagedFileError(f"{path}, record {number}: {problems(error)}. {advice}") from error
    return parsed


def problems(error: ValidationError) -> str:
    """The first few fields that do not fit, each with what is wrong."""
    return "; ".join(
        ".".join(map(str, one["loc"])) + ": " * bool(one["loc"]) + one["msg"].removeprefix("Value error, ")
        for one in error.errors()[:SHOWN_PROBLEMS]
    )
