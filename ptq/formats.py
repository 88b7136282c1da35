"""The public door to the 4-bit number formats: `ptq.formats.get("hif4").quantize(x)`. They live in `ptq.scheme`."""

from ptq.errors import FormatError
from ptq.scheme.format import FORMATS, Codes, Format
from ptq.scheme.format import get_format as get

__all__ = ["FORMATS", "Codes", "Format", "FormatError", "get"]
