"""`ptq bench linear`: parses and shows; the measuring is in ptq.runtime.bench_linear."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ptq.errors import UsageError


def linear(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", help="Rows x outputs x inputs, as 32760x5120x5120; may be repeated.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="Force a backend for our layers; see ptq doctor.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds; the median counts.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Time a quantized linear layer beside float32, bfloat16, FP8 and fake quantization.

    Example: ptq bench linear --shape 1024x1536x1536
    """
    shapes = [_parse_shape(text) for text in shape or ()]
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device!r}: choose auto, cpu or cuda.")

    import torch

    from ptq import ui
    from ptq.cli.common import format_bytes, print_json
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
                    format_bytes(one.weight_bytes),
                    "-" if one.error is None else f"{one.error:.1e}",
                )
                for one in result.measurements
                if one.shape == chosen_shape
            ],
        )


def _parse_shape(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip().lower())
    if match is None or min(int(part) for part in match.groups()) == 0 or int(match[3]) % 64:
        raise UsageError(
            f"--shape {text!r}: expected rows x outputs x inputs with inputs a multiple of 64, as 32760x5120x5120."
        )
    return int(match[1]), int(match[2]), int(match[3])
