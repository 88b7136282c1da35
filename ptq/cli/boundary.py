"""What an exception says to the user: one paragraph and an exit code; only a mistake in the program is a traceback.

Knows the errors of the system (`ptq.errors.describe_os_error`), of memory and of encodings, also where libraries wrap
them; errors that need the knowledge of a stage are raised there, as `PtqError`.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence

from ptq import ui
from ptq.cli.interruption import MESSAGE
from ptq.errors import PtqError, UsageError, describe_os_error

MAY_BE_EMPTY = frozenset({"--negative-prompt"})
"""Options whose value may be an empty text. Everywhere else it is a shell variable that was not set."""
_MEMORY_WORDS = re.compile(r"out of memory|allocate memory|bad_alloc|start new thread|failed to map segment", re.I)
_SYSTEM_ERROR = re.compile(r"\(os error (?P<rust>\d+)\)|\bfile <(?P<path>[^>]*)>.*\((?P<torch>\d+)\)")
"""How libraries in Rust (safetensors, tokenizers) and torch, which maps files, pass an error of the system on."""
_UNNAMED = "Standard output, or a file that the system does not name"
_BUG = "This is a mistake in ptq, not in what you did. Please report it with the lines above, the command, and what `ptq doctor --json` prints; what was finished is kept."


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that are empty (as a path, "" would silently mean the current folder) or not UTF-8 (a name that
    neither JSON nor safetensors can hold).

    Raises:
        UsageError: names the option, the place or the argument.
    """
    for before, argument in zip(("", *arguments), arguments, strict=False):
        option, equals, value = argument.partition("=")
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise UsageError(
                f"The argument {ui.shorten(argument)} has bytes that are not UTF-8. Rename the file or folder, or write the text in UTF-8."
            )
        if argument == "" and before not in MAY_BE_EMPTY:
            place = before if before.startswith("-") else f"The argument behind {before!r}" if before else "The command"
            raise UsageError(f"{place} is empty. Is a shell variable in it not set?")
        if option.startswith("--") and equals and not value and option not in MAY_BE_EMPTY:
            raise UsageError(f"{option} is empty. Is a shell variable in it not set?")


def bear_any_text() -> None:
    """Letters that the encoding of standard output lacks are written as in source code, as Python does on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Write out what is still buffered now, not while Python shuts down: there a failure could not be explained.

    Raises:
        OSError: standard output cannot be written (a full disk, a closed pipe).
    """
    if sys.stdout is None:  # it was closed before this process began: there was nowhere to write to
        return
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (nothing more will be said there)
        raise


def report(error: BaseException, *, debug: bool = False) -> int:
    """Tell the user what happened; returns the exit code.

    Args:
        debug: show the traceback as well.
    """
    if isinstance(error, BrokenPipeError):  # `ptq ... | head`: nobody listens
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        return 1
    text = explain(error)
    frames = "".join(traceback.format_exception(error)).rstrip() if text is None or debug else ""
    _let_go(error)
    try:
        if frames:
            ui.plain(frames)
        if isinstance(error, KeyboardInterrupt):
            ui.info(MESSAGE)
        else:
            ui.error(text or _BUG)
    except OSError:  # this cannot be written either: the exit code still tells
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, PtqError) else 1


def _let_go(error: BaseException) -> None:
    """Close the files and free the memory that the frames of an error hold: to say what happened needs some of both."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__


def explain(error: BaseException) -> str | None:
    """The paragraph for an exception; None for one that only a mistake in the program can cause."""
    said = ui.shorten(" ".join(str(error).split()), 300) or type(error).__name__
    wrapped = _SYSTEM_ERROR.search(said)
    if isinstance(error, PtqError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return MESSAGE
    if is_memory(error):
        return f"There is not enough memory for this ({said}). What was finished is kept. Close other programs or use a machine with more; `--offload`, a smaller --height, --width or --num-frames, and `ptq quantize --max-memory` need less. Then run the same command again."
    if isinstance(error, OSError) and error.errno is not None:
        where = None if error.filename is not None else _UNNAMED
        return f"{describe_os_error(error, where)} What was finished is kept."
    if wrapped and not isinstance(error, OSError):
        number = int(wrapped["rust"] or wrapped["torch"])
        said = said if wrapped["path"] is None else os.strerror(number)
        return f"{describe_os_error(OSError(number, said), wrapped['path'] or _UNNAMED)} What was finished is kept."
    if isinstance(error, OSError):
        return f"The system refused something: {said}. What was finished is kept; --debug shows where it happened."
    if isinstance(error, RecursionError):
        return "Something that was read is nested too deeply to be followed. No file of this program is: check the files that the command names; --debug shows where it happened."
    if isinstance(error, UnicodeError):
        return f"A text or a name has characters that cannot be read or written here ({said}). Use names and files in UTF-8, and a locale with it (LANG=C.UTF-8); --debug shows where it happened."
    if isinstance(error, ImportError) and not (error.name or "").startswith("ptq"):
        return f"A library cannot be loaded ({said}). Install wan-ptq again, into an environment of its own; --debug shows where it happened."
    return None


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out, in the words of Python, the system, torch or the loader of libraries."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, OSError, ImportError)) and bool(_MEMORY_WORDS.search(str(error)))
