"""Which weights a model directory holds: a digest that is the same wherever the directory lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq.errors import PtqError
from ptq.store.files import digest, files_below, read_json
from ptq.store.lora import LoraInfo, LoraTable
from ptq.store.schema import parse
from ptq.wan.variants import EXPERTS

if TYPE_CHECKING:
    from ptq.checkpoint.shards import ShardSet
    from ptq.wan.layout import ModelLayout

_WHOLE_FILE_BYTES = 16 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_WEIGHT_SUFFIXES = (".safetensors", ".json", ".model", ".txt")
_PROVENANCE = ("ptq_manifest.json", "ptq_preset.json")
"""Run times and defaults: no part of the weights."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights a run uses. model: as the user named it. digest: hex SHA-256, see `identify_model`.

    format: of a packed checkpoint, None for an unquantized model. weight_bytes: size on disk. loras: expert -> LoRA in
    its weights: merged when the pipeline is loaded, or (packed) before it was quantized.
    """

    model: str
    digest: str
    format: str | None = None
    weight_bytes: int = 0
    loras: Mapping[str, LoraInfo] = field(default_factory=dict)


def identify_model(model: str, directory: str | Path) -> ModelIdentity:
    """Digest of a diffusers pipeline directory, the same wherever the directory lies.

    Files up to 16 MiB are hashed whole; of larger ones (weight shards, up to 60 GB together) the size, the header and
    64 evenly spaced pieces of 4 KiB: seconds instead of minutes, and any two checkpoints that were rounded, tuned or
    trained differently differ in nearly every piece.

    Raises:
        PtqError: not a diffusers pipeline directory. DamagedFileError: an expert's config.json is not JSON.
    """
    directory = Path(directory)
    if not (directory / "model_index.json").is_file():
        raise PtqError(f"{directory} is not a diffusers pipeline directory: it has no model_index.json.")
    whole, total = _digest_files(directory, files_below(directory))
    return ModelIdentity(model, whole, _checkpoint_format(directory), total, _quantized_with(directory))


def parts_digest(directory: Path, parts: Iterable[str]) -> str:
    """Digest of some components of a diffusers pipeline directory, taken as in `identify_model`."""
    return _digest_files(directory, [path for part in parts for path in files_below(directory / part)])[0]


def _digest_files(directory: Path, paths: Iterable[Path]) -> tuple[str, int]:
    """Hex SHA-256 over names, sizes and contents of those that are weights or configurations, and their bytes."""
    total, parts = 0, []
    for path in paths:
        relative = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix not in _WEIGHT_SUFFIXES or path.name in _PROVENANCE:
            continue
        size = path.stat().st_size
        total += size
        parts.append(f"{relative.as_posix()} {size} {_file_digest(path, size)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest(), total


def base_model_identity(layout: ModelLayout, shards: dict[str, ShardSet]) -> dict[str, Any]:
    """Identity of the original: configurations, and names, sizes and tensor tables of its weight files."""
    files = {
        f"{expert}/{file.name}": {
            "bytes": file.stat().st_size,
            "tensors": digest(
                [[e.name, e.dtype, list(e.shape), e.start] for e in shard.entries.values() if e.file == file]
            ),
        }
        for expert, shard in shards.items()
        for file in shard.files
    }
    return {
        "variant": layout.preset.variant,
        "hub_id": layout.preset.hub_id,
        "configs": {name: digest(config) for name, config in layout.experts.items()},
        "files": files,
    }


def _quantized_with(directory: Path) -> dict[str, LoraInfo]:
    """LoRAs that the manifest of a packed checkpoint names.

    Raises:
        DamagedFileError: it names them as no version does.
    """
    manifest = directory / "ptq_manifest.json"
    content = read_json(manifest) if manifest.is_file() else {}
    calibration = content.get("calibration") if isinstance(content, dict) else None
    named = calibration.get("lora") if isinstance(calibration, dict) else None
    advice = "Copy the checkpoint again."
    return {} if named is None else parse(LoraTable, {"lora": named}, manifest, advice).lora


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
    content = read_json(config)
    quantization = content.get("quantization_config") if isinstance(content, dict) else None
    name = quantization.get("format") if isinstance(quantization, dict) else None
    return name if isinstance(name, str) else None
