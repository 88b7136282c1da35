"""`ptq bench`: speed of quantize + pack and fake-quant here, of linear layers in bench_linear.py.

Parses and shows; the measuring is in ptq.runtime.
"""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer

from ptq.cli.bench_linear import linear
from ptq.errors import UsageError

bench_app = typer.Typer(help="Measure the speed of quantization and of quantized layers on this machine.")


@bench_app.callback()
def bench() -> None:
    """Measure the speed of quantization and of quantized layers on this machine."""


bench_app.command()(linear)


@bench_app.command()
def quantize(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", help="Weight shape N x K, as 5120x5120; may be repeated. Default: the shapes of Wan 2.2."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds; the median counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Elements a second for quantize + pack and fake-quant of both formats, beside a copy and other libraries.

    Example: ptq bench quantize --shape 5120x5120
    """
    shapes = [_parse_shape(text) for text in shape or ()]

    from ptq import ui
    from ptq.runtime.bench_quantize import WAN_SHAPES, bench_quantize

    chosen = shapes or list(WAN_SHAPES)
    with ui.progress("Shapes", len(chosen)) as bar:
        result = bench_quantize(chosen, repeats, lambda done: bar.advance(note=f"{done[0]} x {done[1]}"))
    if as_json:
        ui.console.out(json.dumps(result.as_json(), indent=2), highlight=False)
        return
    machine = result.machine
    ui.table(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}",
        ("shape", "candidate", "Melem/s", "ms", "x torchao"),
        [
            (
                f"{one.shape[0]} x {one.shape[1]}",
                one.candidate,
                f"{one.megaelements_per_second:.1f}",
                f"{one.seconds * 1e3:.1f}",
                "-" if one.over_torchao is None else f"{one.over_torchao:.2f}",
            )
            for one in result.measurements
        ],
    )
    for package in result.not_installed:
        ui.info(f"{package}: not installed, not compared. pip install 'wan-ptq[bench]'")


def _parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if match is None or int(match[1]) == 0 or int(match[2]) == 0 or int(match[2]) % 64:
        raise UsageError(f"--shape {text!r}: expected rows x columns with columns a multiple of 64, as 5120x13824.")
    return int(match[1]), int(match[2])
