"""What must not outlive this process: temporary files, locks, children. Undone when their block ends, and at a signal.

A signal ends the command where it is, without unwinding (`ptq/cli/interruption.py`): code of other libraries swallows
exceptions. What would be left over then is registered here before it comes to be.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_pending: list[tuple[int, Callable[[], object]]] = []
"""(process, what to call): a forked child has the list too, and undoes nothing of its parent's."""


@contextlib.contextmanager
def at_end(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` when the block ends, however it ends. It must be quick, take no lock, and bear being called twice.

    Where it returns False (not now: no file can be opened, say) it is called once more when the command ends.
    """
    entry = (os.getpid(), undo)
    _pending.append(entry)
    try:
        yield
    finally:
        if undo() is not False:
            _pending.remove(entry)


def run_child(command: Sequence[str], **how: Any) -> int:
    """Run another program that does not outlive this one, and return its exit code.

    Args:
        how: as of `subprocess.Popen`. The child has a process group of its own, which ends with it, and no input.
    """
    import subprocess  # not before it is needed: signals are settled first

    def kill() -> None:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)

    with subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, **how) as child, at_end(kill):
        return child.wait()


def undo_all() -> None:
    """Undo everything that is registered, the newest first; what fails is let be, for the process is about to end."""
    for process, undo in reversed(_pending.copy()):
        if process == os.getpid():
            with contextlib.suppress(OSError):
                undo()
