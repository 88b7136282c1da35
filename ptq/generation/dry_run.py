"""What a run would do, without loading the model: units, what is done already, disk, time where it can be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.generation.directory import GenerationDirectory
from ptq.generation.settings import Settings
from ptq.generation.units import make_units
from ptq.prompts.sample import Sample
from ptq.store.run_manifest import read_lines
from ptq.store.sharding import Shard

_VIDEO_BYTES, _FRAME_BYTES = 0.12, 2.0
"""Of a pixel: H.264 at CRF 14 of ordinary footage, and deflated frames. Rough, and on the safe side."""
_LATENT_CHANNELS, _STRIDE_T, _STRIDE = 16, 4, 8
"""Of A14B; TI2V-5B needs a quarter less."""


@dataclass(frozen=True)
class Plan:
    """units: of the whole run; own: of this shard; done, failed: of those, by the manifests (files not opened).

    bytes_per_unit: estimate on disk. seconds_per_unit: mean of the units this directory holds, None where it has none: see
    `estimate_seconds`.
    """

    shard: Shard
    units: int
    own: int
    done: int
    failed: int
    bytes_per_unit: int
    seconds_per_unit: float | None
    free_bytes: int

    @property
    def to_make(self) -> int:
        return self.own - self.done

    @property
    def bytes_needed(self) -> int:
        return self.to_make * self.bytes_per_unit

    @property
    def seconds(self) -> float | None:
        return None if self.seconds_per_unit is None else self.seconds_per_unit * self.to_make

    def as_json(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return {
            "shard": f"{self.shard.index}/{self.shard.count}",
            "units": self.units,
            "units_of_this_shard": self.own,
            "done": self.done,
            "failed": self.failed,
            "to_make": self.to_make,
            "bytes_per_unit": self.bytes_per_unit,
            "bytes_needed": self.bytes_needed,
            "free_bytes": self.free_bytes,
            "seconds": self.seconds,
        }


def unit_bytes(settings: Settings) -> int:
    """Estimated bytes on disk of one unit: video, latents, frames where they are kept."""
    pixels = settings.num_frames * settings.height * settings.width
    positions = (settings.num_frames - 1) // _STRIDE_T + 1
    latents = _LATENT_CHANNELS * positions * (settings.height // _STRIDE) * (settings.width // _STRIDE) * 4
    return int(latents + pixels * (_VIDEO_BYTES + (_FRAME_BYTES if settings.save_frames else 0.0)))


def plan_run(
    samples: Sequence[Sample],
    settings: Settings,
    out: str | Path,
    *,
    shard: Shard | None = None,
    samples_per_prompt: int = 1,
    fresh: bool = False,
) -> Plan:
    """Plan a run; reads manifests, writes nothing.

    Raises:
        UsageError: see `make_units`. DamagedFileError: a manifest line is damaged.
    """
    shard = shard or Shard()
    units = make_units(samples, samples_per_prompt)
    own = shard.select(units)
    known = {} if fresh else read_lines(Path(out))
    lines = [known[unit.name] for unit in own if unit.name in known]
    seconds = [line.seconds for line in known.values() if line.is_done and line.seconds is not None]
    return Plan(
        shard=shard,
        units=len(units),
        own=len(own),
        done=sum(line.is_done for line in lines),
        failed=sum(not line.is_done for line in lines),
        bytes_per_unit=unit_bytes(settings),
        seconds_per_unit=sum(seconds) / len(seconds) if seconds else None,
        free_bytes=GenerationDirectory(out).free_bytes(),
    )
