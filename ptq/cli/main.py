"""`ptq`: collects the commands, turns errors into one paragraph and an exit code.

Nothing heavy is imported here or at the top of a command file: `ptq --help` answers at once.
"""

from __future__ import annotations

import os
import sys

import typer

from ptq.cli.bench import bench_app
from ptq.cli.calibrate import calibrate
from ptq.cli.compare import compare
from ptq.cli.demo import demo
from ptq.cli.doctor import doctor
from ptq.cli.evaluate import evaluate
from ptq.cli.export import export
from ptq.cli.generate import generate
from ptq.cli.inspect import inspect
from ptq.cli.package import package, verify
from ptq.cli.prompts import prompts
from ptq.cli.quantize import quantize
from ptq.cli.report import report
from ptq.cli.status import status
from ptq.errors import PtqError

app = typer.Typer(
    name="ptq",
    help="W4A4 post-training quantization (HiF4, MXFP4) for Wan 2.2 and 2.1 video models.\n\nStart with `ptq demo`: the whole job on the embedded model, in minutes, on a CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
JOB = (demo, calibrate, quantize, generate, evaluate, report, package, verify)
ASIDE = (inspect, compare, export, prompts, status, doctor)
for command in (*JOB, *ASIDE):
    app.command()(command)
app.add_typer(bench_app, name="bench")


def run() -> None:
    """Entry point of the `ptq` command. `--debug` anywhere shows tracebacks of user errors too.

    Tensors in CPU memory get huge pages where the system has them (Linux): a block at A14B width otherwise spends a third
    of its time on page faults (docs/benchmarks.md). torch reads the variable at its first allocation.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except PtqError as error:
        if debug:
            raise
        from rich.markup import escape

        from ptq.ui import stderr

        stderr.print(f"[bold red]Error:[/bold red] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    run()
