"""Packed pipelines under the hooks that move weights while they run: the same latents, bit for bit, as without hooks.

The hooks of accelerate and diffusers run with the CPU as the device that computes: between calls weights are on meta, on
disk or behind other storage, and every call sees new parameters or new storage, as it would on a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from diffusers import WanTransformer3DModel
from torch import nn

import ptq
from ptq.runtime import QuantLinear
from ptq.runtime.cpu import decoded_cache

CPU = torch.device("cpu")


def experts(pipe: Any) -> list[nn.Module]:
    return [expert for expert in (pipe.transformer, pipe.transformer_2) if expert is not None]


def sequential(pipe: Any, tmp_path: Path) -> None:
    for expert in experts(pipe):
        cpu_offload(expert, execution_device=CPU)


def disk(pipe: Any, tmp_path: Path) -> None:
    for index, expert in enumerate(experts(pipe)):
        disk_offload(expert, str(tmp_path / str(index)), execution_device=CPU)


def block_weights_on_disk(expert: nn.Module) -> dict[str, str]:
    """A device map: everything in memory but the blocks."""
    names = [name for name, _ in expert.named_children()] + ["scale_shift_table"]
    return {name: "disk" if name == "blocks" else "cpu" for name in names}


def dispatched(pipe: Any, tmp_path: Path) -> None:
    for index, expert in enumerate(experts(pipe)):
        devices = block_weights_on_disk(expert)
        dispatch_model(expert, devices, main_device="cpu", offload_dir=str(tmp_path / str(index)))


def grouped_blocks(pipe: Any, tmp_path: Path) -> None:
    for index, expert in enumerate(experts(pipe)):
        path = str(tmp_path / str(index))
        expert.enable_group_offload(
            CPU, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=path
        )


def grouped_leaves(pipe: Any, tmp_path: Path) -> None:
    """In memory: leaves on disk come back at other alignments, where float32 sums differ in an original model too."""
    for expert in experts(pipe):
        expert.enable_group_offload(CPU, CPU, offload_type="leaf_level")


HOOKS = {
    "sequential": sequential,
    "disk": disk,
    "dispatch": dispatched,
    "group of blocks": grouped_blocks,
    "group of leaves": grouped_leaves,
}


@pytest.fixture
def cache_limit() -> Iterator[Callable[[int], None]]:
    """A function that sets the decoded cache's limit in bytes for one test."""
    before = decoded_cache.limit_bytes

    def set_limit(limit: int) -> None:
        decoded_cache.limit_bytes = limit

    yield set_limit
    decoded_cache.limit_bytes = before


@pytest.mark.parametrize("format_name", ["hif4", "mxfp4"])
@pytest.mark.parametrize("hooks", HOOKS)
def test_latents_under_hooks_are_those_without(packed, tmp_path: Path, generate, format_name: str, hooks: str) -> None:
    expected = generate(ptq.load_pipeline(packed[format_name]))
    pipe = ptq.load_pipeline(packed[format_name])
    assert (pipe.transformer_2 is not None) == (format_name == "hif4")
    HOOKS[hooks](pipe, tmp_path)
    for _ in range(2):
        assert torch.equal(generate(pipe), expected)


def test_weights_are_on_meta_between_calls_and_leave_no_decoded_copies(packed, tmp_path: Path, generate) -> None:
    pipe = ptq.load_pipeline(packed["hif4"])
    gc.collect()
    before = decoded_cache.used_bytes
    disk(pipe, tmp_path)
    generate(pipe)
    layers = [m for expert in experts(pipe) for m in expert.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 40 and all(p.is_meta for layer in layers for p in layer.parameters())
    gc.collect()
    assert decoded_cache.used_bytes <= before


def test_hooks_and_no_cache(packed, tmp_path: Path, generate, cache_limit: Callable[[int], None]) -> None:
    expected = generate(ptq.load_pipeline(packed["hif4"]))
    cache_limit(0)
    pipe = ptq.load_pipeline(packed["hif4"])
    sequential(pipe, tmp_path)
    assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_pipeline_with_mapped_experts(packed, generate, device_map: Any) -> None:
    expected = generate(ptq.load_pipeline(packed["hif4"]))
    pipe = ptq.load_pipeline(packed["hif4"])
    for name in ("transformer", "transformer_2"):
        mapped = WanTransformer3DModel.from_pretrained(
            packed["hif4"] / name, dtype=torch.float32, device_map=device_map
        )
        setattr(pipe, name, mapped)
    assert torch.equal(generate(pipe), expected)


def test_device_map_with_disk(packed, tmp_path: Path, generate) -> None:
    expected = generate(ptq.load_pipeline(packed["hif4"]))
    pipe = ptq.load_pipeline(packed["hif4"])
    for name in ("transformer", "transformer_2"):
        mapped = WanTransformer3DModel.from_pretrained(
            packed["hif4"] / name,
            dtype=torch.float32,
            device_map=block_weights_on_disk(pipe.transformer),
            offload_folder=tmp_path / name,
        )
        assert mapped.blocks[0].attn1.to_q.weight_packed.is_meta
        setattr(pipe, name, mapped)
    assert torch.equal(generate(pipe), expected)
