"""`ptq doctor`: versions, processors, which recipe and backend to take, memory and disk; what a model needs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import default_device, print_json, quiet_libraries


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Also check this model: a packed checkpoint, a diffusers directory or `tiny`.", show_default=False
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what this machine offers, which recipe to take on it and, for a model, whether it is whole, what fits and how long it takes.

    Example: ptq doctor tiny-hif4
    """
    from ptq.wan.loading import find_local_model

    layout = None if model is None else find_local_model(model)
    ui.info(f"Looking at this machine{'' if layout is None else f' and at {layout.path}'}.")
    quiet_libraries()

    from ptq.runtime.diagnosis import gpu_memory, machine_facts
    from ptq.wan.attention import attention_facts

    facts = machine_facts() | attention_facts(default_device())
    if layout is not None:
        from ptq.wan.check import check_model
        from ptq.wan.estimates import memory_facts
        from ptq.wan.speed import time_facts

        check_model(layout)
        if layout.is_packed:
            facts |= _checkpoint_facts(layout.path)
        facts |= memory_facts(layout, gpu_memory())
        facts |= time_facts(layout, "cpu" if gpu_memory() is None else "cuda")
    if as_json:
        print_json(facts)
    else:
        ui.details("This machine", facts)


def _checkpoint_facts(checkpoint: Path) -> dict[str, str]:
    """That every file is as recorded, and where its weights land in FP8."""
    from ptq.checkpoint.layers import describe_placements
    from ptq.checkpoint.manifest import verify_files

    manifest = verify_files(checkpoint)
    experts, rule = {row.expert for row in manifest.layers}, manifest.recipe.scheme.input_rule
    facts = {f"checkpoint {checkpoint}": "complete, every file as recorded in its manifest"}
    return facts | describe_placements(checkpoint, experts, manifest.format, rule)
