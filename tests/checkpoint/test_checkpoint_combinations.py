"""LoRA, cache and offloading on packed experts, in every combination: offloading changes no bit, the other two do what they do alone.

The hooks of offloading run with the CPU as the device that computes; `offload_blocks` is the package's own, the others are those
that diffusers sets for its modes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import loras
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from torch import nn

from ptq.wan.caching import enable_cache
from ptq.wan.loading import load_pipeline
from ptq.wan.pipeline import OFFLOAD_MODES, experts_of, offload_blocks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
CPU = torch.device("cpu")
CACHE = "first-block:1"


def by_model(pipe: Any) -> None:
    for expert in experts_of(pipe).values():
        cpu_offload_with_hook(expert, CPU)


def by_layer(pipe: Any) -> None:
    for expert in experts_of(pipe).values():
        cpu_offload(expert, execution_device=CPU)


def by_block(pipe: Any) -> None:
    offload_blocks(pipe, "cpu")


HOOKS: dict[str, Callable[[Any], None]] = {"model": by_model, "group": by_block, "sequential": by_layer}


class Made:
    """Latents of each combination without offloading, made once, and how often the last block of each expert computed."""

    def __init__(self, packed: dict[str, Path], generate: Callable[[Any], Any], folder: Path) -> None:
        self._packed, self._generate, self._file = packed["hif4"], generate, folder / "a.safetensors"
        linears = loras.block_linears(load_pipeline(self._packed).transformer)
        loras.write(self._file, loras.diffusers_names(loras.factors(linears, std=0.05)))
        self.without = {(lora, cache): self.run(lora, cache) for lora in (False, True) for cache in (None, CACHE)}

    def run(self, lora: bool, cache: str | None, offload: str = "none") -> tuple[torch.Tensor, dict[str, int]]:
        """Latents of the second of two equal videos: the first has left nothing."""
        pipe = load_pipeline(self._packed)
        if lora:
            pipe.load_lora_weights(self._file, adapter_name="a")
            pipe.load_lora_weights(self._file, adapter_name="a", load_into_transformer_2=True)
        experts, calls = experts_of(pipe), dict.fromkeys(experts_of(pipe), 0)
        enable_cache(experts, cache)
        if offload != "none":
            HOOKS[offload](pipe)

        def count(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any) -> None:
                calls[name] += 1

            return hook

        for name, expert in experts.items():
            expert.blocks[-1].attn1.register_forward_pre_hook(count(name))
        first = self._generate(pipe)
        calls.update(dict.fromkeys(calls, 0))
        again = self._generate(pipe)
        assert torch.equal(first, again)
        return again, calls


@pytest.fixture(scope="module")
def made(packed, generate, tmp_path_factory) -> Made:
    return Made(packed, generate, tmp_path_factory.mktemp("lora"))


def test_each_changes_the_latents_and_only_a_cache_skips_blocks(made: Made):
    found = [latents for latents, _ in made.without.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    for lora in (False, True):
        plain, cached = made.without[lora, None][1], made.without[lora, CACHE][1]
        assert sum(plain.values()) == 12  # 6 steps, two branches
        assert all(2 <= cached[name] <= plain[name] for name in plain) and sum(cached.values()) < 12


@pytest.mark.parametrize("offload", [mode for mode in OFFLOAD_MODES if mode != "none"])
@pytest.mark.parametrize("cache", [None, CACHE], ids=["no cache", "cache"])
@pytest.mark.parametrize("lora", [False, True], ids=["no LoRA", "LoRA"])
def test_offloading_changes_no_bit(made: Made, lora: bool, cache: str | None, offload: str):
    latents, calls = made.run(lora, cache, offload)
    expected, wanted = made.without[lora, cache]
    assert torch.equal(latents, expected) and calls == wanted


def test_an_adapter_comes_and_goes_under_cache_and_group_offloading(made: Made, packed, generate):
    """diffusers sets the hooks of group offloading anew when an adapter comes; the cache's stay inside of them."""
    pipe = load_pipeline(packed["hif4"])
    enable_cache(experts_of(pipe), CACHE)
    offload_blocks(pipe, "cpu")
    for load in (False, True):
        pipe.load_lora_weights(made._file, adapter_name="a", load_into_transformer_2=load)
    assert torch.equal(generate(pipe), made.without[True, CACHE][0])
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), made.without[False, CACHE][0])
