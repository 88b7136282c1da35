"""The exceptions whose text is written for the user, and foreign values in such texts.

Everything a user can cause (a missing file, a wrong option, a damaged checkpoint) raises one of these. The command line
prints the text as one paragraph and exits with `exit_code`; a traceback appears only with `--debug`. Programming errors
keep their own types and their tracebacks.
"""

import reprlib
from typing import Any


class PtqError(Exception):
    """What was found, what was expected, and what to do, in one paragraph. Exit code 1."""

    exit_code = 1


class UsageError(PtqError):
    """The request itself is wrong (bad option, contradictory settings). Exit code 2."""

    exit_code = 2


class DamagedFileError(PtqError):
    """A file is truncated, edited or inconsistent; the text names the file and, where known, the tensor or line."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHOWN_CHARS = 160


def shown(value: Any) -> str:
    """A value that others wrote, as Python writes it, for a message: one short line, whatever the value holds."""
    text = _SHORT.repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."
