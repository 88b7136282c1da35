"""`ptq`: collects the commands.

Nothing heavy is imported here or at the top of a command file: `ptq --help` answers at once.
"""

from __future__ import annotations

import typer

from ptq.cli.bench import bench_app
from ptq.cli.calibrate import calibrate
from ptq.cli.compare import compare
from ptq.cli.demo import demo
from ptq.cli.doctor import doctor
from ptq.cli.evaluate import evaluate
from ptq.cli.export import export
from ptq.cli.generate import generate
from ptq.cli.help import Command, Group
from ptq.cli.inspect import inspect
from ptq.cli.package import package, verify
from ptq.cli.prompts import prompts
from ptq.cli.quantize import quantize
from ptq.cli.report import report
from ptq.cli.status import status

app = typer.Typer(
    name="ptq",
    cls=Group,
    help="W4A4 post-training quantization (HiF4, MXFP4) for Wan 2.2 and 2.1 video models.\n\nStart with `ptq demo`: the whole job on the embedded model, in minutes, on a CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
JOB = (demo, calibrate, quantize, generate, evaluate, report, package, verify)
ASIDE = (inspect, compare, export, prompts, status, doctor)
for command in (*JOB, *ASIDE):
    app.command(cls=Command)(command)
app.add_typer(bench_app, name="bench")
