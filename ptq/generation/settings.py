"""What every unit of a run shares: sampler settings, and which weights made it.

Plain values only; nothing here loads a model. The digest of a run (`rundir.py`) is taken over these.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptq.errors import PtqError, UsageError
from ptq.store.files import files_below
from ptq.wan.variants import EXPERTS

_WHOLE_FILE_BYTES = 16 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_WEIGHT_SUFFIXES = (".safetensors", ".json", ".model", ".txt")
_PROVENANCE = ("ptq_manifest.json", "ptq_preset.json")  # run times and defaults: no part of the weights


@dataclass(frozen=True)
class Settings:
    """Everything that decides a unit's pixels besides the weights, the prompt, the image and k.

    height, width: pixels. fps: frames a second of the video file. guidance_scale: of the high-noise expert (or the only
    one); guidance_scale_2: of the low-noise expert, None with one expert. seed: base of the unit seeds. dtype: of the
    loaded weights ("float32" or "bfloat16"). image_to_video: units start from their sample's image.
    attention_backend: name for diffusers' `set_attention_backend`, None for its default. context_parallel: processes that
    make each video together.
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

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "fps", "steps", "max_sequence_length", "context_parallel"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if self.flow_shift <= 0:
            raise UsageError(f"flow_shift must be positive, found {self.flow_shift}.")
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, found {self.seed}.")
        if self.height % 2 or self.width % 2:
            raise UsageError(f"The video must have an even height and width, found {self.height} x {self.width}.")

    def as_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights a run uses. model: as the user named it. digest: hex SHA-256, see `identify_model`.

    format: "hif4" or "mxfp4" for a packed checkpoint, None for an unquantized model. weight_bytes: size on disk.
    """

    model: str
    digest: str
    format: str | None = None
    weight_bytes: int = 0


def identify_model(model: str, directory: str | Path) -> ModelIdentity:
    """Digest of a diffusers pipeline directory, the same wherever the directory lies.

    Files up to 16 MiB are hashed whole; of larger ones (weight shards, up to 60 GB together) the size, the header and
    64 evenly spaced pieces of 4 KiB: seconds instead of minutes, and any two checkpoints that were rounded, tuned or
    trained differently differ in nearly every piece.

    Raises:
        PtqError: not a diffusers pipeline directory.
    """
    directory = Path(directory)
    if not (directory / "model_index.json").is_file():
        raise PtqError(f"{directory} is not a diffusers pipeline directory: it has no model_index.json.")
    total, parts = 0, []
    for path in files_below(directory):
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix not in _WEIGHT_SUFFIXES or path.name in _PROVENANCE:
            continue
        size = path.stat().st_size
        total += size
        parts.append(f"{relative.as_posix()} {size} {_file_digest(path, size)}")
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return ModelIdentity(model, digest, _checkpoint_format(directory), total)


def _file_digest(path: Path, size: int) -> str:
    with open(path, "rb") as handle:
        if size <= _WHOLE_FILE_BYTES:
            return hashlib.file_digest(handle, "sha256").hexdigest()
        result = hashlib.sha256()
        header = int.from_bytes(handle.read(8), "little") if path.suffix == ".safetensors" else 0
        result.update(handle.read(min(header, _WHOLE_FILE_BYTES)))
        for index in range(_SAMPLES):
            handle.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            result.update(handle.read(_SAMPLE_BYTES))
        return result.hexdigest()


def _checkpoint_format(directory: Path) -> str | None:
    config = directory / EXPERTS[0] / "config.json"
    if not config.is_file():
        return None
    quantization = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
    return quantization.get("format")
