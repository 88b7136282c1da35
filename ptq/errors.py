"""The exceptions whose text is written for the user, what the system's errors mean to one, foreign values in such texts.

Everything a user can cause (a missing file, a wrong option, a damaged checkpoint) raises one of these. The command line
prints the text as one paragraph and exits with `exit_code`; a traceback appears only with `--debug`. Programming errors
keep their own types and their tracebacks.
"""

import errno
import os
import reprlib
from typing import Any


class PtqError(Exception):
    """What was found, what was expected, and what to do, in one paragraph. Exit code 1."""

    exit_code = 1


class UsageError(PtqError):
    """The request itself is wrong (bad option, contradictory settings). Exit code 2."""

    exit_code = 2


class FormatError(PtqError, ValueError):
    """What a format or a transform cannot take: an unknown name, a wrong dtype, K that is no multiple of the group."""


class DamagedFileError(PtqError):
    """A file is truncated, edited or inconsistent; the text names the file and, where known, the tensor or line."""


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system answers where there is no room for more."""
_ADVICE = {
    **dict.fromkeys(FULL, "Free some space or choose another place, then run the same command again."),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Choose a place that you may use, or ask its owner for permission."),
    errno.EROFS: "It can only be read; choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "Check the path; if another program removed it meanwhile, run the same command again.",
    errno.ENOTDIR: "A part of the path is a file where a folder is meant; choose another path.",
    errno.EISDIR: "It is a folder where a file is meant; choose another path.",
    errno.EEXIST: "Something of that name is there already; choose another path, or move it away.",
    errno.ENOTEMPTY: "Another program is writing into it; stop it, then run the same command again.",
    errno.ELOOP: "Its links lead in a circle; choose another path.",
    errno.EMFILE: "This process may not open more files: raise the limit (`ulimit -n 4096`), then run the same command again.",
    errno.ENFILE: "The machine has no more open files to give; close other programs, then run the same command again.",
    errno.ENOMEM: "Free some memory, then run the same command again.",
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE),
        "The disk or the network behind it failed; check it, then run the same command again.",
    ),
}
_OTHERWISE = "Check the path and the disk, then run the same command again."


def describe_os_error(error: OSError, path: str | os.PathLike[str] | None = None, advice: str = "") -> str:
    """What the system refused, at which path, and what to do, as sentences.

    Args:
        path: what was worked on; where the error names another one, that is added. advice: instead of the usual one.
    """
    if isinstance(error, FileExistsError) and path is not None:  # mkdir, where a file is in the way
        error = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename)
    named = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
    target = named if path is None else os.fspath(path)
    where = "" if target is None else f"{target}: "
    at = (
        f" ({named})"
        if path is not None and named is not None and os.path.dirname(named) != os.path.dirname(target or "")
        else ""
    )
    return f"{where}{error.strerror or error}{at}. {advice or _ADVICE.get(error.errno or 0, _OTHERWISE)}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHOWN_CHARS = 160


def shown(value: Any) -> str:
    """A value that others wrote, as Python writes it, for a message: one short line, whatever the value holds."""
    text = _SHORT.repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."
