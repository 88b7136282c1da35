"""Which part of the work this process does: `--shard i/N`, or the rank that a launcher put into the environment.

Round robin over the list of prompts or units: deterministic, balanced, and without communication. Understands torchrun and
`accelerate launch` (RANK, WORLD_SIZE), srun steps (SLURM_PROCID) and SLURM job arrays, alone or together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ptq.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `count`; `source` says who decided that."""

    index: int = 0
    count: int = 1
    source: str = field(default="default", compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"Shard {self.index}/{self.count} does not exist: shards count from 0, so of {self.count} the last is {self.count - 1}/{self.count}."
            )

    @property
    def tag(self) -> str:
        """`<i>of<N>`, as in the manifest's file name."""
        return f"{self.index}of{self.count}"

    def select(self, items: Sequence[T]) -> list[T]:
        """The items of this shard, in order."""
        return list(items[self.index :: self.count])

    def size(self, total: int) -> int:
        """How many of `total` items are this shard's."""
        return len(range(self.index, total, self.count))


def parse_shard(text: str) -> Shard:
    """`i/N` from the command line.

    Raises:
        UsageError: not of that form, or i is not below N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or int(match[2]) < 1:
        raise UsageError(f"--shard expects i/N, for example 0/4, found {text!r}.")
    return Shard(int(match[1]), int(match[2]), "--shard")


def detect_shard(environ: Mapping[str, str]) -> Shard:
    """The shard that the launcher's environment variables name; 0 of 1 without a launcher.

    SLURM_STEP_NUM_TASKS is set by srun only: a batch script that starts one process without srun is one shard,
    whatever --ntasks says.
    """
    if _number(environ, "WORLD_SIZE", "1") > 1:
        return Shard(_number(environ, "RANK"), _number(environ, "WORLD_SIZE"), "RANK and WORLD_SIZE")
    index, count, sources = 0, 1, []
    if _number(environ, "SLURM_ARRAY_TASK_COUNT", "1") > 1:
        count = _number(environ, "SLURM_ARRAY_TASK_COUNT")
        step = _number(environ, "SLURM_ARRAY_TASK_STEP", "1")
        index = (_number(environ, "SLURM_ARRAY_TASK_ID") - _number(environ, "SLURM_ARRAY_TASK_MIN")) // step
        sources.append("SLURM_ARRAY_TASK_ID")
    if _number(environ, "SLURM_STEP_NUM_TASKS", "1") > 1:
        tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
        index, count = index * tasks + _number(environ, "SLURM_PROCID"), count * tasks
        sources.append("SLURM_PROCID")
    return Shard(index, count, " and ".join(sources) or "default")


def local_rank(environ: Mapping[str, str]) -> int:
    """Index of this process on its machine, which picks the GPU; 0 without a launcher."""
    return _number(environ, "LOCAL_RANK" if "LOCAL_RANK" in environ else "SLURM_LOCALID", "0")


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = environ.get(name, default)
    if value is None or not value.isdigit():
        raise UsageError(
            f"The launcher set no usable {name} (found {value!r}). Name the part with --shard i/N instead."
        )
    return int(value)
