"""Packed checkpoints for other tools: compressed-tensors (MXFP4), msModelSlim words (HiF4), fake-quantized bfloat16.

The first two take codes as they are, so the checkpoint must be in the original basis, and its inputs scaled as that tool scales
them (`ptq.checkpoint.targets`): those tools know neither block transforms nor smoothing. Quantize with
`--set scheme.transform=none` for them. The bfloat16 export undoes the transform; without one it is bit-equal to the weights that the runtime computes with, with one it
is rounded to bfloat16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ptq.checkpoint.layers import PACKED, layer_names, read_layer
from ptq.checkpoint.manifest import CARD_FILE, MANIFEST_FILE
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.safetensors_file import TensorEntry, read_header
from ptq.checkpoint.shards import MAX_SHARD_BYTES, ShardSet, write_component
from ptq.checkpoint.targets import check_exact, refuse_existing
from ptq.runtime import QuantLinear
from ptq.store.files import read_json, write_bytes
from ptq.store.run_directory import hold_whole

PART_BYTES = 2**30
"""Converted tensors held in memory at a time."""


def export_component(source: Path, out: Path, target: str) -> None:
    """Export one expert directory.

    Args:
        source: an expert of a packed checkpoint.
        out: directory to write.
        target: one of `TARGETS`.

    Raises:
        UsageError: as `check_exact`.
        PtqError: damaged source, disk full.
    """
    config = read_json(source / "config.json")
    packed = PackedConfig.parse(config["quantization_config"], str(source / "config.json"))
    check_exact(config["quantization_config"], target)
    shards = ShardSet(source)
    exported: dict[str, TensorEntry] = {}
    parts = out / "parts"
    parts.mkdir(parents=True)
    for index, tensors in enumerate(_batches(_converted(shards, packed, target))):
        file = parts / f"{index:05d}.safetensors"
        save_file(tensors, file)
        exported.update(read_header(file))
    write_component(out, _in_order(shards, exported, packed), MAX_SHARD_BYTES)
    shutil.rmtree(parts)
    own = {key: value for key, value in config.items() if key != "quantization_config"}
    if target == "compressed-tensors":
        own["quantization_config"] = compressed_tensors_config(packed, shards)
    elif target == "msmodelslim":
        own["quantization_config"] = {"quant_method": "msmodelslim-hif4", "word": "e6m2<<24 | lv2<<16 | lv3, MSB first"}
    write_bytes(out / "config.json", (json.dumps(own, indent=2, sort_keys=True) + "\n").encode())


def export_pipeline(source: Path, experts: Mapping[str, Any], out: Path, target: str) -> None:
    """Export every expert and copy the rest; `out` appears only when complete.

    Args:
        experts: names of the experts below `source` -> their config.json.

    The model card is left out: it says how to load the packed checkpoint, and the verdict on that.

    Raises:
        UsageError: `out` exists; otherwise as `export_component`. PtqError: another process writes `out`.
    """
    refuse_existing(out)
    for config in experts.values():
        check_exact(config["quantization_config"], target)
    with hold_whole(out):
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        for expert in experts:
            export_component(source / expert, partial / expert, target)
        for path in sorted(source.iterdir()):
            if path.name in experts or path.name in (MANIFEST_FILE, CARD_FILE):
                continue
            if path.is_dir():
                shutil.copytree(path, partial / path.name)
            else:
                shutil.copyfile(path, partial / path.name)
        partial.rename(out)


def _converted(shards: ShardSet, packed: PackedConfig, target: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors that the target stores differently, under their new names."""
    for name in layer_names(shards.entries) if target != "compressed-tensors" else ():
        if target == "msmodelslim":
            yield f"{name}.weight_scale", msmodelslim_words(shards.read(f"{name}.weight_scale"))
            continue
        layer = QuantLinear.from_packed(read_layer(shards.read, name, packed.scheme))
        yield f"{name}.weight", layer.dequantize().to(torch.bfloat16)


def _batches(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Groups of about PART_BYTES, so that a part file fits in memory."""
    batch: dict[str, Tensor] = {}
    for name, tensor in tensors:
        batch[name] = tensor
        if sum(t.nbytes for t in batch.values()) >= PART_BYTES:
            yield batch
            batch = {}
    if batch:
        yield batch


def _in_order(shards: ShardSet, exported: Mapping[str, TensorEntry], packed: PackedConfig) -> list[TensorEntry]:
    """Original order, with converted tensors in the place of the packed ones."""
    entries = []
    dense = any(name.endswith(".weight") for name in exported)
    beside = tuple(f".{name}" for name in packed.scheme.tensors(0, 0))
    for name, entry in shards.entries.items():
        if name in exported:
            entries.append(exported[name])
        elif dense and name.endswith(PACKED):
            entries.append(exported[name.removesuffix("_packed")])
        elif not (dense and name.endswith(beside)):
            entries.append(entry)
    return entries


def msmodelslim_words(words: Tensor) -> Tensor:
    """PTO words int32 [N, G] -> (e6m2 << 24) | (lv2 << 16) | lv3 with most-significant-bit-first lanes, int32 [N, G]."""
    word = words.to(torch.int64) & 0xFFFFFFFF
    byte = word & 0xFF
    lv2 = sum(((word >> (8 + i)) & 1) << (7 - i) for i in range(8))
    lv3 = sum(((word >> (16 + i)) & 1) << (15 - i) for i in range(16))
    value = (byte << 24) | (lv2 << 16) | lv3
    return torch.where(value >= 2**31, value - 2**32, value).to(torch.int32)


def compressed_tensors_config(packed: PackedConfig, shards: ShardSet) -> dict[str, Any]:
    """The `mxfp4-pack-quantized` configuration; Linears that stay dense are listed by name under `ignore`."""
    arguments = {
        **{
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": packed.scheme.format.group_size,
            "symmetric": True,
        },
        **{"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
    }
    dense = sorted(
        name.removesuffix(".weight")
        for name, entry in shards.entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    )
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**arguments, "dynamic": False},
                "input_activations": {**arguments, "dynamic": True},
                "format": "mxfp4-pack-quantized",
            }
        },
        "ignore": dense,
    }
