"""`ptq bench`: speed of quantize + pack and fake-quant, and of linear layers; the measuring is in ptq.runtime."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json
from ptq.cli.help import Command, Group
from ptq.errors import UsageError

bench_app = typer.Typer(cls=Group, help="Measure the speed of quantization and of quantized layers on this machine.")


@bench_app.callback()
def bench() -> None:
    """Measure the speed of quantization and of quantized layers on this machine."""


@bench_app.command(cls=Command)
def linear(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="MxNxK",
            help="Rows x outputs x inputs, as 32760x5120x5120; may be repeated.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="Force a backend for our layers; see ptq doctor.", show_default=False),
    ] = None,
    repeats: options.Repeats = 20,
    as_json: options.Json = False,
) -> None:
    """Time a quantized linear layer beside float32, bfloat16, FP8 and fake quantization.

    Example: ptq bench linear --shape 1024x1536x1536
    """
    shapes = [_parse_shape(text, "rows x outputs x inputs", "32760x5120x5120") for text in shape or ()]
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device!r}: choose auto, cpu or cuda.")

    ui.info("Timing linear layers.")

    import torch

    from ptq.runtime.backends import use_backend
    from ptq.runtime.bench_linear import BASELINE, CPU_SHAPES, GPU_SHAPES, bench_linear

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch finds no usable GPU on this machine. Use --device cpu, or run it elsewhere."
        )
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    use_backend(backend)
    chosen = shapes or list(GPU_SHAPES if kind == "cuda" else CPU_SHAPES)
    with ui.progress("Shapes", len(chosen)) as bar:
        result = bench_linear(
            chosen, torch.device(kind), repeats, lambda done: bar.advance(note="x".join(map(str, done)))
        )
    if as_json:
        print_json(result.as_json())
        return
    where = f"{result.device}, {result.threads} threads, torch {result.torch}"
    for chosen_shape in chosen:
        ui.table(
            f"{'x'.join(map(str, chosen_shape))} (rows x outputs x inputs), {where}",
            ("candidate", "ms", "TFLOP/s", f"x {BASELINE[kind]}", "weight kept", "error"),
            [
                (
                    one.candidate,
                    f"{one.seconds * 1e3:.3f}",
                    f"{one.tflops:.3f}",
                    f"{one.speedup:.2f}",
                    ui.format_bytes(one.weight_bytes),
                    "-" if one.error is None else f"{one.error:.1e}",
                )
                for one in result.measurements
                if one.shape == chosen_shape
            ],
        )


@bench_app.command(cls=Command)
def quantize(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NxK",
            help="Weight shape, as 5120x5120; may be repeated. Default: the shapes of Wan 2.2.",
        ),
    ] = None,
    repeats: options.Repeats = 5,
    as_json: options.Json = False,
) -> None:
    """Elements a second for quantize + pack and fake-quant of both formats, beside a copy and other libraries.

    Example: ptq bench quantize --shape 5120x5120
    """
    shapes = [_parse_shape(text, "rows x columns", "5120x13824") for text in shape or ()]

    ui.info("Timing quantize + pack and fake-quant of both formats.")

    from ptq.runtime.bench_quantize import WAN_SHAPES, bench_quantize

    chosen = shapes or list(WAN_SHAPES)
    with ui.progress("Shapes", len(chosen)) as bar:
        result = bench_quantize(chosen, repeats, lambda done: bar.advance(note=f"{done[0]} x {done[1]}"))
    if as_json:
        print_json(result.as_json())
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


def _parse_shape(text: str, names: str, example: str) -> Any:
    """Sizes of "5120x13824" as a tuple; `names` says what they are ("rows x columns"), the last a multiple of 64."""
    sizes = [int(part) if part.isdecimal() else 0 for part in text.strip().lower().split("x")]
    last = names.split(" x ")[-1]
    if len(sizes) != len(names.split(" x ")) or not all(sizes) or sizes[-1] % 64:
        raise UsageError(f"--shape {text!r}: expected {names} with {last} a multiple of 64, as {example}.")
    return tuple(sizes)
