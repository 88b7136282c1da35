"""`ptq compare`: two checkpoints or two evaluations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json, show_tables


def compare(
    a: Annotated[Path, typer.Argument(help="Packed checkpoint or evaluation directory.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another of the same kind.", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Show what differs: settings, sizes, errors and, for evaluations, the verdicts.

    Example: ptq compare out/hif4 out/mxfp4
    """
    from ptq.report.compare import compare_sides, read_side

    sides = [read_side(path) for path in (a, b)]
    tables = compare_sides(*sides)
    if as_json:
        content = {
            table.key: [
                {
                    "name": name.text,
                    "a": {"text": x.text, "values": x.values},
                    "b": {"text": y.text, "values": y.values},
                }
                for name, x, y in table.rows
            ]
            for table in tables
        }
        print_json({"a": str(a), "b": str(b), "tables": content})
        return
    ui.say(f"A: {a}\nB: {b}")
    show_tables(tables)
    for name, side in zip("AB", sides, strict=True):
        if side.manifest is None:
            ui.warn(
                f"The checkpoint of {name} was not found beside {side.path}: its recipe, size and errors are not shown."
            )
