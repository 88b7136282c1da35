"""What a packed checkpoint can be exported to, and what a request for it is checked against before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from ptq.errors import UsageError

TARGETS = {"compressed-tensors": "mxfp4", "msmodelslim": "hif4", "bf16": None}
"""Target -> the one format that it takes; None: any."""


def check_target(target: str) -> None:
    """Raise UsageError where there is no such target."""
    if target not in TARGETS:
        raise UsageError(f"--to takes one of {', '.join(TARGETS)}, found {target!r}.")


def refuse_existing(out: Path) -> None:
    """Raise UsageError where the directory to write is there."""
    if out.exists():
        raise UsageError(f"{out} exists already; choose another --out.")
