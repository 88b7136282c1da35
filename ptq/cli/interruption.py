"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line, nothing left over, exit code 128 + the signal's number.

The command ends inside the signal's handler, without an exception: libraries swallow those (an import under `except:`,
callbacks from C, `__del__`). What must not stay behind is registered in `ptq/store/ending.py`; everything else is made to
survive a kill. Imports next to nothing, for it has to be there before the rest is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MESSAGE = "Interrupted. What was finished is kept; the same command goes on from there."
_SHOW_CURSOR = "\r\x1b[?25h\n"
"""A progress bar hides the cursor and leaves it in its line."""
_GRACE_S = 5.0
"""So long the main thread may compute outside Python before another thread ends the process."""
_is_ending = False


def listen() -> None:
    """From now on, signals end this process. One that was ignored when it started (`nohup`, `&`) stays ignored."""
    from ptq.store import ending  # noqa: F401  (loaded now, because a handler had better import nothing)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    atexit.register(_ignore)
    with contextlib.suppress(OSError, RuntimeError):  # no more files or threads to be had: the handlers are there
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def _ignore() -> None:
    """Everything is done; while Python shuts down it would answer signals in its own way."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, _frame: FrameType | None = None) -> None:
    """End the process; a second signal does not wait for what the first one still removes."""
    global _is_ending
    from ptq.store.ending import undo_all

    if not _is_ending:
        _is_ending = True
        with contextlib.suppress(OSError):
            os.write(2, f"{_SHOW_CURSOR if os.isatty(2) else ''}{MESSAGE}\n".encode())
        undo_all()
    os._exit(128 + number)


def _watch(reader: int) -> None:
    """Where the main thread is busy in C code, which no handler interrupts: end at the second signal, or soon."""
    while (number := os.read(reader, 1)[0]) not in SIGNALS:
        pass
    select.select([reader], [], [], _GRACE_S)
    _end(number)
