"""Where each packed MXFP4 weight of a checkpoint lands when it is executed on FP8 units, for `ptq doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ptq.checkpoint.shards import ShardSet
from ptq.runtime.exactness import place, summarize


def describe_placements(checkpoint: Path, experts: Iterable[str]) -> dict[str, str]:
    """Expert -> how many of its weights go on which rung of the ladder, and which do not fit FP8 exactly."""
    facts = {}
    for expert in sorted(experts):
        shards = ShardSet(checkpoint / expert)
        layers = [name.removesuffix(".weight_packed") for name in shards.entries if name.endswith(".weight_packed")]
        placements = {
            name: place(shards.read(f"{name}.weight_packed"), shards.read(f"{name}.weight_scale")) for name in layers
        }
        facts[f"FP8 placement, {expert}"] = "; ".join(summarize(placements))
    return facts
