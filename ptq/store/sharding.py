"""Which part of the work this process does: `--shard i/N`, or the rank that a launcher put into the environment.

Round robin over the list of prompts or units: deterministic, balanced, and without communication. Understands torchrun and
`accelerate launch` (RANK, WORLD_SIZE), srun steps (SLURM_PROCID) and SLURM job arrays, alone or together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ptq.errors import UsageError, shown

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
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if match is None or int(match[2]) < 1:
        raise UsageError(f"--shard expects i/N, for example 0/4, found {shown(text)}.")
    return Shard(int(match[1]), int(match[2]), "--shard")


def detect_shard(environ: Mapping[str, str], run: Path | None = None) -> Shard:
    """The shard that the launcher's environment variables name; 0 of 1 without a launcher.

    SLURM_STEP_NUM_TASKS is set by srun only: a batch script that starts one process without srun is one shard,
    whatever --ntasks says. An array is a partition of the whole only where its indices have no gaps and its size is the
    number of parts that the run has: resubmitting the tasks that failed gives neither.

    Args:
        run: the run directory, if there may be one.

    Raises:
        UsageError: variables that contradict each other, an array with gaps, or one of another size than the run.
    """
    index, count, sources = 0, 1, []
    if "SLURM_ARRAY_TASK_ID" in environ:
        index, count = _array_part(environ)
        sources.append("SLURM_ARRAY_TASK_ID")
    if _number(environ, "WORLD_SIZE", "1") > 1:
        inner, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        sources.append("RANK and WORLD_SIZE")
    else:
        inner, size = 0, _number(environ, "SLURM_STEP_NUM_TASKS", "1")
        if size > 1:
            inner = _number(environ, "SLURM_PROCID")
            sources.append("SLURM_PROCID")
    index, count = index * size + inner, count * size
    begun = shards_begun(run) if run is not None and "SLURM_ARRAY_TASK_ID" in environ else None
    if begun is not None and begun > 1 and begun != count:
        raise UsageError(
            f"{run} was begun in {begun} parts, but this SLURM array has {count}, so its indices do not say which part is meant. To make single parts again, name each with --shard i/{begun} (for an array that began at 0: --shard $SLURM_ARRAY_TASK_ID/{begun}); to split anew, use --shard with the new number of parts."
        )
    return Shard(index, count, " and ".join(sources) if count > 1 else "default")


def _array_part(environ: Mapping[str, str]) -> tuple[int, int]:
    """(position in the array, its size).

    Raises:
        UsageError: the array has gaps.
    """
    task, count = _number(environ, "SLURM_ARRAY_TASK_ID"), _number(environ, "SLURM_ARRAY_TASK_COUNT", "1")
    if count <= 1:
        return 0, 1
    step = max(1, _number(environ, "SLURM_ARRAY_TASK_STEP", "1"))
    first, last = _number(environ, "SLURM_ARRAY_TASK_MIN"), _number(environ, "SLURM_ARRAY_TASK_MAX")
    position, rest = divmod(task - first, step)
    if (last - first) // step + 1 != count or rest or not 0 <= position < count:
        raise UsageError(
            f"The SLURM array has {count} tasks from {first} to {last} in steps of {step} (this is {task}): it has gaps, so its indices do not say which part of the whole is meant. Name the part with --shard i/N, where N is the number of parts of the first submission (for an array that began at 0: --shard $SLURM_ARRAY_TASK_ID/N)."
        )
    return position, count


def shards_begun(run: Path) -> int | None:
    """The number of parts that a run directory was last begun in, by its locks and manifests; None for a new one."""
    found = [path for pattern in ("state/shard-*of*.lock", "manifest-*of*.jsonl") for path in run.glob(pattern)]
    newest = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    match = None if newest is None else re.search(r"of(\d+)\.", newest.name)
    return None if match is None else int(match[1])


def local_rank(environ: Mapping[str, str]) -> int:
    """Index of this process on its machine, which picks the GPU; 0 without a launcher."""
    return _number(environ, "LOCAL_RANK" if "LOCAL_RANK" in environ else "SLURM_LOCALID", "0")


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = environ.get(name, default)
    if value is None or not re.fullmatch(r"[0-9]{1,9}", value):
        raise UsageError(
            f"The launcher set no usable {name} (found {shown(value)}). Name the part with --shard i/N instead."
        )
    return int(value)
