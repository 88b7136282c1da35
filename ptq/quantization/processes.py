"""Several processes on one quantize run, as started by `accelerate launch` or torchrun.

Every process replays the same records; the distinct inputs of a block are shared out by their cost, and each process
solves its own. Solutions are then exchanged, so all processes go on with the same quantized block and end with the codes
that one process would have made. Only the first process writes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ptq.errors import UsageError


@dataclass(frozen=True)
class Processes:
    """This process among all of a run."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """What the launcher says (RANK and WORLD_SIZE); joins the process group on first use."""
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if rank >= size:
            raise UsageError(
                f"The launcher set RANK={rank} and WORLD_SIZE={size}: ranks count from 0 and stay below the number of processes. Unset RANK to run alone."
            )
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(rank, size)

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def own(self, costs: Mapping[str, float]) -> set[str]:
        """The names this process works on: largest first, each to the process with the least work so far."""
        load = [0.0] * self.size
        mine = set()
        for name in sorted(costs, key=lambda key: (-costs[key], key)):
            target = min(range(self.size), key=load.__getitem__)
            load[target] += costs[name]
            if target == self.rank:
                mine.add(name)
        return mine

    def merge(self, value: dict[str, Any]) -> dict[str, Any]:
        """The union of every process's dictionary, the same everywhere; keys are disjoint."""
        if self.size == 1:
            return value
        gathered: list[dict[str, Any]] = [{} for _ in range(self.size)]
        dist.all_gather_object(gathered, value)
        return {key: item for part in gathered for key, item in part.items()}

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


ALONE = Processes()
"""One process that does everything."""
