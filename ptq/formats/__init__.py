"""The 4-bit number formats, as pure tensor functions: `get("mxfp4")`, `get("hif4")`.

Numerics, bit layout and golden vectors: docs/formats.md.
"""

from ptq.formats.base import Codes, Format, FormatError
from ptq.formats.hif4 import HiF4
from ptq.formats.mxfp4 import MXFP4

FORMATS: dict[str, Format] = {format_.name: format_ for format_ in (MXFP4(), HiF4())}


def get(name: str) -> Format:
    """The format called `name` ("mxfp4" or "hif4").

    Raises:
        FormatError: no such format.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise FormatError(f"Unknown format {name!r}; choose one of {', '.join(FORMATS)}.") from None


__all__ = ["FORMATS", "Codes", "Format", "FormatError", "get"]
