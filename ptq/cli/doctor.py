"""`ptq doctor`: versions, processors, which backend each format will use, memory and disk; what a checkpoint needs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json


def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Also check this packed checkpoint.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what this machine offers and, for a checkpoint, whether its files are complete and unchanged.

    Example: ptq doctor tiny-hif4
    """
    from ptq.checkpoint.manifest import read_manifest

    if checkpoint is not None:
        read_manifest(checkpoint)
    ui.info(f"Looking at this machine{'' if checkpoint is None else f' and at {checkpoint}'}.")

    from ptq.runtime.diagnosis import machine_facts

    facts = machine_facts()
    if checkpoint is not None:
        from ptq.checkpoint.layers import describe_placements
        from ptq.checkpoint.manifest import verify_files
        from ptq.runtime.diagnosis import gpu_memory
        from ptq.wan.estimates import memory_facts
        from ptq.wan.loading import find_model

        manifest = verify_files(checkpoint)
        facts[f"checkpoint {checkpoint}"] = "complete, every file as recorded in its manifest"
        experts, rule = {row.expert for row in manifest.layers}, manifest.recipe.scheme.input_rule
        facts |= memory_facts(find_model(str(checkpoint)), gpu_memory())
        facts |= describe_placements(checkpoint, experts, manifest.format, rule)
    if as_json:
        print_json(facts)
    else:
        ui.details("This machine", facts)
