"""Entry point of `ptq`: what signals do is settled first, then the commands are imported, then errors become paragraphs.

The one place where an exception meets the user; stages raise and never print. Exit codes: 0 done, 1 an error, 2 a wrong
request, 128 + number for a signal (docs/reliability.md).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from ptq.cli import interruption

if TYPE_CHECKING:
    from typer import Typer

    app: Typer


def run() -> None:
    """Run the command that `sys.argv` names. `--debug` anywhere shows the traceback of every error too.

    Tensors in CPU memory get huge pages where the system has them (Linux): a block at A14B width otherwise spends a third
    of its time on page faults (docs/benchmarks.md). torch reads the variable at its first allocation.
    """
    from ptq.store.ending import undo_all

    interruption.listen()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        from ptq.cli.boundary import bear_any_text, check_arguments, flush_output

        bear_any_text()
        check_arguments(sys.argv[1:])
        from ptq.cli.app import app

        try:
            app()
        finally:
            flush_output()
        code: object = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # noqa: BLE001  (whatever ends the command passes here)
        from ptq.cli.boundary import report

        code = report(error, debug=debug)
    undo_all()  # what could not be undone while an error's frames held files and memory
    raise SystemExit(code)


def __getattr__(name: str) -> Any:
    if name == "app":  # imported when it is asked for: signals come first
        from ptq.cli.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    run()
