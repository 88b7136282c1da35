"""`ptq status DIR`: how far a generation run is, shard by shard, and when it will be done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json

if TYPE_CHECKING:
    from ptq.generation import RunStatus
    from ptq.generation.status import ShardStatus

LISTED_FAILURES = 5


def status(
    directory: Annotated[Path, typer.Argument(help="--out of `ptq generate` or of `ptq calibrate`.")],
    as_json: options.Json = False,
) -> None:
    """Show the state of a generation run (units, rates, time left) or of a calibration directory.

    Example: ptq status runs/hif4
    """
    from ptq.calibration.directory import read_status as read_calibration_status
    from ptq.generation import read_status

    if (directory / "calibration.json").is_file():
        recorded = read_calibration_status(directory)
        if as_json:
            print_json(recorded.as_json())
        else:
            ui.say(recorded.describe())
        return
    state = read_status(directory)
    if as_json:
        print_json(state.as_json())
        return
    columns = ("shard", "state", "done", "of", "failed", "videos/hour", "s/video", "in work")
    ui.table(f"{directory}: {state.model}", columns, [_row(shard) for shard in state.shards])
    ui.say(_sentence(state))
    for name, error in list(state.failed.items())[:LISTED_FAILURES]:
        ui.say(f"failed: {name}: {error}")
    if len(state.failed) > LISTED_FAILURES:
        ui.say(f"... and {len(state.failed) - LISTED_FAILURES} more (--json lists all)")


def _row(shard: ShardStatus) -> tuple[object, ...]:
    return (
        shard.tag,
        "running" if shard.running else "stopped",
        shard.done,
        "-" if shard.share is None else shard.share,
        shard.failed,
        "-" if shard.units_per_hour is None else f"{shard.units_per_hour:.1f}",
        "-" if shard.seconds_per_unit is None else f"{shard.seconds_per_unit:.1f}",
        shard.current or "-",
    )


def _sentence(state: RunStatus) -> str:

    text = f"{state.done} of {state.units} units done, {len(state.failed)} failed, {state.remaining} remaining"
    if state.remaining == 0:
        return f"{text}."
    if state.seconds_left is None:
        return f"{text}; the time left is known after the first video."
    running = any(shard.running for shard in state.shards)
    return f"{text}; {ui.format_seconds(state.seconds_left)} left{'' if running else ' once it runs again'}."
