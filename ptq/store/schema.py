"""What the schemas of all artifacts share: strict keys and types, one paragraph for what does not fit, JSON as it was.

One file of this folder an artifact, named after it. Its writer and all its readers use that one model, so no stage has to
import another to read what the other wrote. A field that old files lack has a default; a key that nobody knows is an error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from ptq import ui
from ptq.errors import DamagedFileError
from ptq.limits import PROMPT_CHARS
from ptq.store.files import read_jsonl, write_json

SHOWN_PROBLEMS, SHOWN_PLACE, SHOWN_PROBLEM = 4, 100, 300
"""Of a refusal: how many fields, and characters of a field's name and of what is wrong with it."""


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

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""How many, or which one from 0 on."""
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
"""A name that becomes part of a path: no separators, no leading dot."""
Text = Annotated[str, Field(max_length=PROMPT_CHARS)]

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
    """The first few fields that do not fit, each with what is wrong; short, whatever the file holds."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[:SHOWN_PROBLEMS]
    places = [ui.shorten(".".join(map(str, one["loc"])), SHOWN_PLACE) for one in found]
    texts = [ui.shorten(one["msg"].removeprefix("Value error, "), SHOWN_PROBLEM) for one in found]
    return "; ".join(f"{place}: {text}" if place else text for place, text in zip(places, texts, strict=True))
