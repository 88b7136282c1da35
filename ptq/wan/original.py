"""Experts in the original Wan layout (names as in the authors' code) -> a diffusers pipeline directory.

The names are mapped by diffusers itself (the table behind `WanTransformer3DModel.from_single_file`), applied to shard
headers instead of tensors: the bytes are then streamed from file to file, so an expert of 57 GB needs no memory and the
values cannot change. VAE, text encoder and tokenizer of the original releases are pickles, which this package never
opens; they come from a pipeline directory of the same variant.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptq.checkpoint.safetensors_file import TensorEntry, read_header
from ptq.checkpoint.shards import INDEX_NAME, WEIGHTS_NAME, ShardSet, write_component
from ptq.errors import PtqError, UsageError
from ptq.store.files import read_json, write_json

EXPERT_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
_HUB_IDS = {16: "Wan-AI/Wan2.2-T2V-A14B-Diffusers", 36: "Wan-AI/Wan2.2-I2V-A14B-Diffusers"}
_SMALL_HUB_ID = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
_CLASS = "WanModel"


def find_original(path: Path) -> dict[str, Path]:
    """Expert name -> folder or file of an original-layout release; empty where `path` is none.

    Args:
        path: a release directory (`high_noise_model/` and `low_noise_model/`, or one model at the top).
    """
    experts = {name: path / folder for name, folder in EXPERT_FOLDERS.items() if (path / folder).is_dir()}
    if len(experts) == len(EXPERT_FOLDERS):
        return experts
    config = path / "config.json"
    single = config.is_file() and not (path / "model_index.json").exists()
    return {"transformer": path} if single and read_json(config).get("_class_name") == _CLASS else {}


def refuse_original(path: Path) -> None:
    """Say how to convert where a user passes an original release.

    Raises:
        PtqError: `path` is one.
    """
    experts = find_original(path)
    if not experts:
        return
    config = next(iter(experts.values())) / "config.json"
    channels = read_json(config).get("in_dim") if config.is_file() else None
    known = _HUB_IDS.get(int(channels or 0), "a pipeline directory of the same variant")
    base = _SMALL_HUB_ID if len(experts) == 1 else known
    raise PtqError(
        f"{path} is a Wan checkpoint in its original layout ({', '.join(p.name for p in experts.values())}); a diffusers pipeline is expected. Convert it once, without loading it: python scripts/convert_original_wan.py {path} --base {base} --out NEW_DIRECTORY. Or use {base} directly."
    )


def convert_original(experts: Mapping[str, Path], base: Path, out: Path) -> Path:
    """Write a pipeline directory with these experts and everything else from `base`.

    Args:
        experts: "transformer" (high noise, or the only one) and "transformer_2" (low noise) -> a folder with shards and
            index, or one .safetensors file; original names, with or without "model.diffusion_model.".
        base: pipeline directory of the same variant; the weights of its experts need not be there.
        out: directory to create; it appears only whole.

    Returns:
        `out`.

    Raises:
        UsageError: `out` exists, or the experts are not those of `base`.
        PtqError: tensors that are not of this model (named), damaged files, full disk.
    """
    from ptq.wan.structure import read_layout

    layout = read_layout(base)
    if set(experts) != set(layout.experts):
        raise UsageError(f"{base} has {', '.join(layout.experts)}, but found {', '.join(experts)} to convert.")
    if out.exists():
        raise UsageError(f"{out} exists already; choose another directory.")
    ordered = {name: _rename(experts[name], config) for name, config in layout.experts.items()}
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base, partial, ignore=lambda _, names: [n for n in names if n in experts or n.startswith(".")])
    for name, entries in ordered.items():
        write_component(partial / name, entries)
        write_json(partial / name / "config.json", layout.experts[name])
    partial.rename(out)
    return out


def _rename(source: Path, config: dict[str, Any]) -> list[TensorEntry]:
    """The expert's tensors under diffusers' names, in state-dict order."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    from ptq.wan.replay import expected_shapes

    found = _read(source)
    mapping = SINGLE_FILE_LOADABLE_CLASSES["WanTransformer3DModel"]["checkpoint_mapping_fn"]
    renamed: dict[str, TensorEntry] = mapping(checkpoint=dict(found))
    wanted = expected_shapes(config, None)
    missing = [name for name in wanted if name not in renamed]
    unknown = [entry.name for name, entry in renamed.items() if name not in wanted]
    if missing or unknown:
        raise PtqError(
            f"{source} is not the model that the base's config.json describes: {len(missing)} tensors are missing (first: {missing[:1]}) and {len(unknown)} are unknown (first: {unknown[:1]}). Quantized (fp8, GGUF) and merged checkpoints cannot be converted; take the original release."
        )
    for name, shape in wanted.items():
        if renamed[name].shape != shape:
            raise PtqError(
                f"{source}: tensor {renamed[name].name} has shape {list(renamed[name].shape)}, the base's config.json asks for {list(shape)}. Choose the base of the same variant."
            )
    return [replace(renamed[name], name=name) for name in wanted]


def _read(source: Path) -> dict[str, TensorEntry]:
    if source.suffix == ".safetensors":
        return read_header(source)
    if not source.is_dir() or not ((source / INDEX_NAME).exists() or (source / WEIGHTS_NAME).exists()):
        raise PtqError(
            f"{source} holds no safetensors weights ({INDEX_NAME} or {WEIGHTS_NAME} expected). Pickled checkpoints (.pth) are never opened."
        )
    return ShardSet(source).entries
