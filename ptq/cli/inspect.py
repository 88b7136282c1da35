"""`ptq inspect`: what a packed checkpoint holds and how each layer fared."""

from __future__ import annotations

from typing import Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json
from ptq.errors import UsageError


def inspect(
    checkpoint: options.Checkpoint,
    layer: Annotated[str | None, typer.Option("--layer", help="Only layers whose name contains this.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show format, bits a value, coverage and the errors of each layer.

    Example: ptq inspect tiny-hif4 --layer attn1.to_q
    """
    from ptq.checkpoint.manifest import read_manifest
    from ptq.cli.quantize import summary

    manifest = read_manifest(checkpoint)
    rows = [row for row in manifest.layers if layer is None or layer in f"{row.expert}.blocks.{row.block}.{row.layer}"]
    if not rows and layer is not None:
        raise UsageError(f"{checkpoint} has no quantized layer whose name contains {layer!r}.")
    if as_json:
        print_json({"summary": summary(manifest), "layers": [row.model_dump(mode="json") for row in rows]})
        return
    ui.details(f"{checkpoint}", summary(manifest))
    ui.say(
        "Relative output errors on calibration tokens, inputs quantized, before tuning and without residual blocks; rtn: plain rounding in the same basis. SQNR: of the weights."
    )
    residual = any(row.residual_blocks for row in rows)
    for expert in dict.fromkeys(row.expert for row in rows):
        ui.table(
            f"Layers of {expert}.blocks",
            ("layer", "shape", "basis", *(["residual"] if residual else []), "SQNR", "rtn error", "error"),
            [
                (
                    f"{row.block}.{row.layer}",
                    f"{row.shape[0]}x{row.shape[1]}",
                    row.basis,
                    *([str(len(row.residual_blocks) or "-")] if residual else []),
                    "-" if row.weight_sqnr_db is None else f"{row.weight_sqnr_db:.1f} dB",
                    f"{row.output_error_rtn:.2e}",
                    f"{row.output_error:.2e}",
                )
                for row in rows
                if row.expert == expert
            ],
        )
