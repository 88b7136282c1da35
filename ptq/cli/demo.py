"""`ptq demo`: the whole job on the embedded model, and its verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json, quiet_libraries
from ptq.errors import UsageError
from ptq.known import FORMATS

if TYPE_CHECKING:
    from ptq.cli.demo_job import DemoResult


def demo(
    format_name: Annotated[str | None, options.format_option("hif4 or mxfp4 [default: both]")] = None,
    model: Annotated[
        str, typer.Option("--model", help="tiny-outliers, tiny, or tiny-i2v (from an image).")
    ] = "tiny-outliers",
    out: Annotated[Path, typer.Option("--out", help="Directory for everything that is made.")] = Path("demo-out"),
    units: Annotated[int, typer.Option("--units", min=2, help="Held-out prompts to generate and judge.")] = 96,
    as_json: options.Json = False,
) -> None:
    """Record, quantize, generate, evaluate on the embedded model: plain rounding beside the default recipes.

    Minutes on a CPU; run again to continue.

    Example: ptq demo --format hif4 --out demo-out
    """
    from ptq.cli.demo_job import MODELS, DemoJob

    names = list(FORMATS) if format_name is None else [format_name]
    if model not in MODELS:
        raise UsageError(
            f"The demo runs on {', '.join(MODELS[:-1])} or {MODELS[-1]}, found {model!r}. Other models: the commands one by one."
        )
    ui.info(f"Running the whole job on {model} for {' and '.join(names)}, in {out}.")

    import torch

    quiet_libraries()
    torch.set_num_threads(1)  # the model's matrices are too small for more: two threads make a W4A4 video slower
    results = DemoJob(out, units, model).run(names[::-1])
    if as_json:
        print_json({r.name: {"verdict": r.evaluation.verdict, "out": str(out)} for r in results})
        return
    _show(results, out)


def _show(results: list[DemoResult], out: Path) -> None:
    from ptq.cli.demo_job import PICTURE
    from ptq.report.cells import percent

    full = ui.format_bytes(2 * results[0].manifest.coverage.quantized_parameters)
    rows = []
    for result in results:
        coverage, judged = result.manifest.coverage, result.evaluation
        rows.append((
            result.name if result.name == result.manifest.format else f"{result.name} ({result.manifest.format})",
            judged.verdict,
            percent(judged.deciding).text,
            "none" if judged.limit is None else f"{judged.limit:.1%}",
            ui.format_bytes(coverage.quantized_bytes + coverage.basis_bytes),
        ))  # fmt: skip
    ui.table(
        f"{results[0].evaluation.units} held-out videos a run; quantized Linears, in bf16 {full}",
        ("recipe", "verdict", "loss, 95 % interval", "limit", "packed"),
        rows,
    )
    for result in results:
        for warning in result.evaluation.warnings:
            ui.warn(f"{result.name}: {warning}")
    ui.say(f"Picture: {out / PICTURE}")
    ui.say(f"Original and quantized videos side by side: {out / 'side-by-side'}")
    for result in results:
        if result.results is not None:
            ui.say(f"Report and submission: {result.results}")
    ui.say(f"All of it: {out}; look closer with `ptq inspect {results[-1].checkpoint}`")
