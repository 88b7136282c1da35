"""`ptq export`: a packed checkpoint for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.errors import UsageError


def export(
    checkpoint: options.Checkpoint,
    to: Annotated[str, typer.Option("--to", help="compressed-tensors (MXFP4), msmodelslim (HiF4) or bf16.")],
    out: Annotated[Path, options.NEW_OUT],
) -> None:
    """Write the checkpoint in another tool's layout.

    Example: ptq export tiny-hif4 --to bf16 --out tiny-hif4-bf16
    """
    from ptq.checkpoint.export import export_pipeline
    from ptq.wan.loading import read_checked

    layout = read_checked(checkpoint)
    if not layout.is_packed:
        raise UsageError(f"{checkpoint} is not a packed checkpoint; make one with `ptq quantize`.")
    export_pipeline(checkpoint, layout.experts, out, to)
    ui.info(f"Wrote {out} for {to}.")
