"""What every unit of a run shares besides its weights: the sampler's settings.

Plain values only; nothing here loads a model. The digest of a run (`directory.py`) is taken over these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ptq import ui
from ptq.errors import DamagedFileError, UsageError
from ptq.generation.units import SEED_SCHEMES, VBENCH_SAMPLES
from ptq.wan.caching import normal_cache

LATER: Mapping[str, Any] = {"cache": None, "compile": False, "seed_scheme": "unit", "fixed_latent": None}
"""Settings that runs of earlier versions lack -> what those had."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a unit's pixels besides the weights, the prompt, the image and k.

    height, width: pixels. fps: frames a second of the video file. guidance_scale: of the high-noise expert (or the only
    one); guidance_scale_2: of the low-noise expert, None with one expert. seed: base of the unit seeds. dtype: of the
    loaded weights ("float32" or "bfloat16"). image_to_video: units start from their sample's image.
    attention_backend: one of `ptq.wan.attention.SLOTS` or of diffusers, None for its default. context_parallel: processes that
    make each video together. cache: as `ptq.wan.caching.normal_cache` gives it, None for none. compile: blocks through
    torch.compile, whose rounding differs in the last bits. seed_scheme: a key of `SEED_SCHEMES`. fixed_latent: SHA-256 of the
    initial latent that every unit starts from (over its float32 bytes [C, T, H, W]), None where each draws its own.
    """

    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    flow_shift: float
    guidance_scale: float
    guidance_scale_2: float | None
    negative_prompt: str
    max_sequence_length: int
    seed: int = 0
    dtype: str = "float32"
    image_to_video: bool = False
    save_frames: bool = False
    attention_backend: str | None = None
    context_parallel: int = 1
    cache: str | None = None
    compile: bool = False
    seed_scheme: str = "unit"
    fixed_latent: str | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "fps", "steps", "max_sequence_length", "context_parallel"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if self.flow_shift <= 0:
            raise UsageError(f"flow_shift must be positive, found {self.flow_shift}.")
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, found {self.seed}.")
        if self.seed_scheme not in SEED_SCHEMES:
            raise UsageError(
                f"--seed-scheme takes {', '.join(SEED_SCHEMES)}, found {ui.shorten(repr(self.seed_scheme))}."
            )
        if self.seed_scheme == "vbench" and self.seed:
            raise UsageError(
                f"--seed-scheme vbench says every seed itself: {SEED_SCHEMES['vbench']}. Leave out --seed, found {self.seed}."
            )
        if self.fixed_latent is not None and not _DIGEST.fullmatch(str(self.fixed_latent)):
            raise UsageError(
                f"fixed_latent must be a SHA-256 in hex digits, found {ui.shorten(repr(self.fixed_latent))}."
            )
        if normal_cache(self.cache) != self.cache:
            raise UsageError(f"cache must be {normal_cache(self.cache)}, found {self.cache}.")
        if self.height % 2 or self.width % 2:
            raise UsageError(f"The video must have an even height and width, found {self.height} x {self.width}.")

    @property
    def one_noise(self) -> bool:
        """Every unit starts from the same noise."""
        return self.seed_scheme == "same" or self.fixed_latent is not None

    def check_samples(self, samples_per_prompt: int) -> None:
        """Refuse more samples of a prompt than the seeds tell apart.

        Raises:
            UsageError: says which option allows how many.
        """
        if self.one_noise and samples_per_prompt > 1:
            option = "--fixed-latent" if self.fixed_latent else "--seed-scheme same"
            raise UsageError(
                f"With {option} every video starts from the same noise, so all {samples_per_prompt} samples of a prompt would be one video. Leave out --samples-per-prompt."
            )
        if self.seed_scheme == "vbench" and samples_per_prompt > VBENCH_SAMPLES:
            raise UsageError(
                f"--seed-scheme vbench has seeds for {VBENCH_SAMPLES} samples of a prompt, found --samples-per-prompt {samples_per_prompt}. Ask for fewer."
            )

    def as_json(self) -> dict[str, Any]:
        """The fields as a JSON object; those that earlier versions lacked only where they are set: such runs are the same."""
        return {name: value for name, value in asdict(self).items() if name not in LATER or value != LATER[name]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """The settings of a run.json.

        Raises:
            DamagedFileError: a field is unknown or missing.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise DamagedFileError(f"The settings of the run are not those of this version ({error}).") from error


def departures(settings: Settings, others: Mapping[str, Any], whose: str) -> list[str]:
    """Settings that are not those of others, each with both values.

    Args:
        others: name -> value; a name that `Settings` does not have is passed over.
        whose: words before the other value, such as "calibrated with".
    """
    own = settings.as_json()
    return [
        f"{name} {_shown(own[name])} ({whose} {_shown(value)})"
        for name, value in others.items()
        if name in own and own[name] != value
    ]


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else ui.shorten(repr(value), 40)
