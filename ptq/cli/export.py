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
    from ptq.checkpoint.targets import TARGETS, check_exact, check_target, refuse_existing
    from ptq.wan.layout import read_layout

    check_target(to)
    refuse_existing(out)
    layout = read_layout(checkpoint)
    if not layout.is_packed:
        raise UsageError(f"{checkpoint} is not a packed checkpoint; make one with `ptq quantize`.")
    for config in layout.experts.values():
        check_exact(config["quantization_config"], to)
    ui.info(f"Exporting {checkpoint} for {to}.")

    from ptq.checkpoint.export import export_pipeline
    from ptq.wan.check import check_model

    check_model(layout)
    export_pipeline(checkpoint, layout.experts, out, to)
    ui.info(f"Wrote {out} for {to}: {TARGETS[to].exact}.")
