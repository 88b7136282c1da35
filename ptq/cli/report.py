"""`ptq report`: an evaluation as a self-contained page and as a technical report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json
from ptq.errors import PtqError, UsageError


def report(
    run: Annotated[Path, typer.Argument(help="Evaluation directory, or directory of `ptq demo`.", show_default=False)],
    html: Annotated[Path | None, typer.Option("--html", help="Page to write [default: RUN/report.html].")] = None,
    pdf: Annotated[Path | None, typer.Option("--pdf", help="PDF to write [default: RUN/report.pdf].")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Packed checkpoint, where it is not found by itself.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Generation directory of the original, if it was moved.")
    ] = None,
    candidate: Annotated[
        Path | None, typer.Option(help="Generation directory of the quantized model, if moved.")
    ] = None,
    ablation: Annotated[
        Path | None, typer.Option(help="JSON table of recipes to include: title, columns, rows, note.")
    ] = None,
    videos: Annotated[int, typer.Option(min=0, help="Pairs of videos in the page (at most about 13 MB of them).")] = 6,
    as_json: options.Json = False,
) -> None:
    """Write report.html and report.pdf; with only --html or --pdf, only that one. The checkpoint's model card gets the verdict.

    Example: ptq report evaluation --html hif4.html --pdf hif4.pdf
    """
    from ptq.report import Sources, evaluation_directories, render
    from ptq.store.files import write_bytes

    directories = evaluation_directories(run)
    named = html or pdf or checkpoint or reference or candidate
    if len(directories) > 1 and named:
        raise UsageError(
            f"{run} holds {len(directories)} evaluations; --html, --pdf, --checkpoint, --reference and --candidate need one. Name it: ptq report {directories[0]} ..."
        )
    ui.info(f"Writing the report of {run}.")
    results = []
    for directory in directories:
        suffix = f"-{directory.name}" if len(directories) > 1 else ""
        both = html is None and pdf is None
        targets = {
            "html": html or (run / f"report{suffix}.html" if both else None),
            "pdf": pdf or (run / f"report{suffix}.pdf" if both else None),
        }
        sources = Sources(directory, checkpoint, reference, candidate, ablation)
        made = render(sources, html=bool(targets["html"]), pdf=bool(targets["pdf"]), videos=videos)
        results.append({"evaluation": str(directory), "verdict": made.verdict})
        if not as_json:
            ui.say(made.verdict)
        for kind, target in targets.items():
            if target is not None:
                content: bytes = getattr(made, kind)
                write_bytes(target, content)
                results[-1][kind] = str(target)
                ui.info(f"{target}: {ui.format_bytes(len(content))}")
        try:
            card = made.write_card()
        except PtqError as error:
            ui.warn(f"The verdict is not in the checkpoint's model card. {error}")
        else:
            if card is not None:
                results[-1]["card"] = str(card)
                ui.info(f"{card}: model card with the verdict")
    if as_json:
        print_json(results)
