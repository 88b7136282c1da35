"""From finished blocks to a diffusers pipeline directory: shards, config, copied components, manifest.

Tensors that quantization did not touch are copied byte for byte from the original shards; components besides the experts
are copied (or linked), never loaded and saved again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptq.checkpoint.manifest import CARD_FILE
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.safetensors_file import TensorEntry
from ptq.checkpoint.shards import ShardSet, write_component
from ptq.errors import PtqError
from ptq.store.files import write_bytes, write_json
from ptq.wan.layout import ModelLayout
from ptq.wan.presets import PRESET_FILE, ModelPreset


def write_expert(
    directory: Path,
    config: Mapping[str, object],
    packed: PackedConfig,
    state_names: Sequence[str],
    shards: ShardSet,
    changed: Mapping[str, TensorEntry],
    max_shard_bytes: int,
) -> None:
    """Write one packed expert.

    Args:
        config: the original config.json.
        state_names: names of the packed model's tensors in state-dict order.
        changed: tensors from the finished blocks, and what a LoRA changed; everything else comes from `shards`.
    """
    entries = [changed.get(name) or shards.entries[name] for name in state_names]
    if directory.exists():
        shutil.rmtree(directory)  # of an interrupted or unprotected pass; its shards may be named otherwise
    write_component(directory, entries, max_shard_bytes)
    own = {**config, "quantization_config": packed.to_dict()}
    write_bytes(directory / "config.json", (json.dumps(own, indent=2, sort_keys=True) + "\n").encode())


def copy_components(layout: ModelLayout, target: Path, preset: ModelPreset, *, link: bool) -> None:
    """Copy everything but the experts and the card: VAE, text encoder, tokenizer, scheduler, model_index.json.

    Args:
        preset: generation defaults of the checkpoint.
        link: make symbolic links to the original files instead of copies.

    Raises:
        PtqError: the disk is full; nothing is left under the final name.
    """
    try:
        for source in sorted(layout.path.iterdir()):
            if source.name in (*layout.experts, CARD_FILE) or source.name.startswith("."):
                continue
            destination = target / source.name
            if destination.is_symlink() or destination.is_file():
                destination.unlink()
            elif destination.is_dir():
                shutil.rmtree(destination)
            if link:
                destination.symlink_to(source.resolve())
            elif source.is_dir():
                shutil.copytree(source, destination)
            else:
                shutil.copyfile(source, destination)
    except (OSError, shutil.Error) as error:
        raise PtqError(
            f"Could not copy {layout.path} to {target}: {error}. Free some space, or pass --link to link the components instead of copying them; then run the same command again."
        ) from error
    write_json(target / PRESET_FILE, preset.model_dump())
