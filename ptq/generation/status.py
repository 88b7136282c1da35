"""The state of a whole run from its directory: every shard, its rate, and when the run will be done.

Reads `run.json`, the manifests, locks and claims; writes nothing and loads no model. "Running" means that a process
holds the shard's lock, as far as this machine can see.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.generation.claims import units_in_work
from ptq.generation.directory import GenerationDirectory
from ptq.store.locks import live_shards
from ptq.store.run_info import read_run_info
from ptq.store.run_manifest import ManifestLine, Manifests
from ptq.store.sharding import Shard


@dataclass(frozen=True)
class ShardStatus:
    """One manifest. share: units that fall to it (None: a manifest of an earlier number of shards).

    seconds_per_unit: mean of its finished units. current: file stem of the unit in work.
    """

    tag: str
    share: int | None
    done: int
    failed: int
    seconds_per_unit: float | None
    running: bool
    current: str | None
    last_finished: str | None

    @property
    def units_per_hour(self) -> float | None:
        return 3600 / self.seconds_per_unit if self.seconds_per_unit else None

    def as_json(self) -> dict[str, Any]:
        """The shard as a JSON object."""
        return {**vars(self), "units_per_hour": self.units_per_hour}


@dataclass(frozen=True)
class RunStatus:
    """The whole run. failed: unit name -> error. seconds_left: None while nothing is known about the rate."""

    directory: Path
    model: str
    digest: str
    units: int
    done: int
    failed: dict[str, str]
    shards: list[ShardStatus]
    seconds_left: float | None

    @property
    def remaining(self) -> int:
        """Units without a finished video, failed ones included."""
        return self.units - self.done

    def as_json(self) -> dict[str, Any]:
        """The status as a JSON object."""
        shards = [shard.as_json() for shard in self.shards]
        return {**vars(self), "directory": str(self.directory), "remaining": self.remaining, "shards": shards}


def read_status(path: str | Path) -> RunStatus:
    """Read the state of a run.

    The number of units is what the run was last started with, or the number of units with a line where that is more (a
    run that was continued with fewer prompts).

    Raises:
        PtqError: not a generation directory. DamagedFileError: `run.json` or a manifest line is damaged.
    """
    directory = GenerationDirectory(path)
    info = read_run_info(directory.path)
    manifests = Manifests(directory.path)
    manifests.refresh()
    lines = list(manifests)
    total, count = max(info.plan.units, len(lines)), info.plan.shards
    live, current = set(live_shards(directory.state)), units_in_work(directory.state)
    tags = sorted({*manifests.by_shard, *live, *(Shard(i, count).tag for i in range(count))}, key=_tag_order)
    shards = [_read_shard(tag, count, total, manifests.by_shard.get(tag, {}), tag in live, current) for tag in tags]
    done = sum(line.is_done for line in lines)
    return RunStatus(
        directory=directory.path,
        model=str(info.model),
        digest=info.digest,
        units=total,
        done=done,
        failed={line.unit: str(line.error) for line in lines if not line.is_done},
        shards=shards,
        seconds_left=_seconds_left(shards, total - done),
    )


def _tag_order(tag: str) -> tuple[int, int]:
    index, _, count = tag.partition("of")
    return int(count), int(index)


def _read_shard(
    tag: str, count: int, total: int, lines: dict[str, ManifestLine], running: bool, current: dict[str, str]
) -> ShardStatus:
    index, shards = (int(part) for part in tag.split("of"))
    done = [line for line in lines.values() if line.is_done]
    seconds = [line.seconds for line in done if line.seconds is not None]
    return ShardStatus(
        tag=tag,
        share=Shard(index, count).size(total) if shards == count else None,
        done=len(done),
        failed=len(lines) - len(done),
        seconds_per_unit=sum(seconds) / len(seconds) if seconds else None,
        running=running,
        current=current.get(tag) if running else None,
        last_finished=max((line.finished for line in done if line.finished), default=None),
    )


def _seconds_left(shards: list[ShardStatus], remaining: int) -> float | None:
    """Remaining units over the sum of the rates of the running shards, or of all shards that made something."""
    if remaining == 0:
        return 0.0
    working = [shard for shard in shards if shard.running] or shards
    known = [shard.seconds_per_unit for shard in working if shard.seconds_per_unit]
    if not known:
        return None
    rate = len(working) / (sum(known) / len(known))  # a running shard without a finished unit is as fast as the others
    return remaining / rate
