"""`tiny-outliers`: the embedded model with persistent channel outliers planted, computing the same function.

Real Wan activations have a few channels that are tens of times larger than the rest, in every token and at every step;
a small model trained for an hour has none. Multiplying a channel where it is produced and dividing the matching weight
columns where it is consumed plants one without changing what the model computes:

- inputs of attn1.to_q/k/v and ffn.net.0.proj: rows of time_proj (shared by all blocks) and of each block's
  scale_shift_table, with the columns of the Linears that read the modulated norm;
- input of attn2.to_q: weight and bias of the affine norm2, with the columns of attn2.to_q;
- inputs of attn1.to_out.0 and attn2.to_out.0: rows of to_v, with the columns of to_out.

The input of ffn.net.2 comes out of a GELU and cannot be rescaled. Factors are powers of two, so every product is exact and the
files are the same on every machine; only 1 + scale rounds, in float32, in which results are stored.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ptq.checkpoint.safetensors_file import read_header
from ptq.checkpoint.shards import MAX_SHARD_BYTES, ShardSet, write_component
from ptq.store.files import digest, sha256_file, temporary_directory
from ptq.wan.block import block_prefix
from ptq.wan.layout import ModelLayout, read_layout

SEED = 20
"""Of channels and factors."""
CHANNELS = 4
"""Outlier channels of each input."""
FACTORS = (16.0, 32.0, 64.0)
"""Their sizes, times those of the other channels: powers of two around the 20 to 60 that tell recipes apart (docs/quality.md)."""
MODULATED = {("attn1.to_q", "attn1.to_k", "attn1.to_v"): (0, 1), ("ffn.net.0.proj",): (3, 4)}
"""Linears behind a modulated norm -> chunks of the modulation vector with its shift and its scale."""


def plant_outliers(state: dict[str, Tensor], num_blocks: int, seed: int = SEED) -> dict[str, Tensor]:
    """A state dict of a WanTransformer3DModel -> one that computes the same with outlier channels (float32).

    Args:
        state: tensor name -> tensor, all of an expert.
        num_blocks: its transformer blocks.
        seed: of channels and factors; `CHANNELS` channels of each input get one of `FACTORS`.
    """
    state = {name: tensor.float().clone() for name, tensor in state.items()}
    generator = torch.Generator().manual_seed(seed)
    width = state[f"{block_prefix(0)}attn1.to_q.weight"].shape[1]
    time_proj = {key: state[f"condition_embedder.time_proj.{key}"] for key in ("weight", "bias")}
    for linears, (shift, scale) in MODULATED.items():
        s = _factors(width, generator)  # the same for all blocks, because time_proj is
        for chunk in (shift, scale):
            rows = slice(chunk * width, (chunk + 1) * width)
            time_proj["weight"][rows] *= s.unsqueeze(1)
            time_proj["bias"][rows] *= s
        for index in range(num_blocks):
            table = state[f"{block_prefix(index)}scale_shift_table"]
            table[0, shift] *= s
            table[0, scale] = s * (1.0 + table[0, scale]) - 1.0
            _divide_columns(state, index, linears, s)
    for index in range(num_blocks):
        _plant_in_block(state, index, width, generator)
    return state


def _plant_in_block(state: dict[str, Tensor], index: int, width: int, generator: torch.Generator) -> None:
    prefix = block_prefix(index)
    s = _factors(width, generator)
    state[f"{prefix}norm2.weight"] *= s
    state[f"{prefix}norm2.bias"] *= s
    _divide_columns(state, index, ("attn2.to_q",), s)
    for attention in ("attn1", "attn2"):
        s = _factors(width, generator)
        state[f"{prefix}{attention}.to_v.weight"] *= s.unsqueeze(1)
        state[f"{prefix}{attention}.to_v.bias"] *= s
        _divide_columns(state, index, (f"{attention}.to_out.0",), s)


def _factors(width: int, generator: torch.Generator) -> Tensor:
    """Ones, except `CHANNELS` random channels, each with one of `FACTORS`."""
    channels = torch.randperm(width, generator=generator)[:CHANNELS]
    s = torch.ones(width)
    s[channels] = torch.tensor(FACTORS)[torch.randint(len(FACTORS), (CHANNELS,), generator=generator)]
    return s


def _divide_columns(state: dict[str, Tensor], index: int, linears: tuple[str, ...], s: Tensor) -> None:
    for linear in linears:
        state[f"{block_prefix(index)}{linear}.weight"] /= s.unsqueeze(0)


def make_outlier_pipeline(source: ModelLayout, out: Path) -> Path:
    """Write a pipeline directory whose experts are those of `source` with outliers planted; it appears only whole."""
    with temporary_directory(out.parent, out.name) as partial:
        shutil.copytree(
            source.path, partial, ignore=lambda folder, names: _weights(folder, names, source), dirs_exist_ok=True
        )
        for expert in source.experts:
            shards = ShardSet(source.path / expert)
            state = plant_outliers({name: shards.read(name) for name in shards.entries}, source.num_blocks(expert))
            scratch = partial / f"{expert}.safetensors"
            save_file(state, scratch)
            entries = read_header(scratch)
            write_component(partial / expert, [entries[name] for name in shards.entries], MAX_SHARD_BYTES)
            scratch.unlink()
        try:
            partial.rename(out)
        except OSError:
            if not out.is_dir():  # another process was first: its files are the same
                raise
    return out


def _weights(folder: str, names: list[str], source: ModelLayout) -> list[str]:
    in_expert = Path(folder).name in source.experts
    return [name for name in names if in_expert and ".safetensors" in name]


def outlier_directory(source: Path) -> Path:
    """The cached pipeline derived from `source`, made when absent (folder wan-ptq in the user's cache directory)."""
    layout = read_layout(source)
    files = {str(f): sha256_file(f) for expert in layout.experts for f in ShardSet(source / expert).files}
    identity = digest([SEED, CHANNELS, FACTORS, sorted(files.values())])[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wan-ptq"
    target = cache / f"{source.name}-outliers-{identity}"
    return target if target.exists() else make_outlier_pipeline(layout, target)
