"""LoRA on packed pipelines, through diffusers' own calls: the adapter lies beside the codes, and leaves no trace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loras
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook

from ptq.errors import UsageError
from ptq.runtime import QuantLinear
from ptq.wan.loading import load_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
CPU = torch.device("cpu")
REFUSED = "fused with an adapter"


@pytest.fixture
def pipe(packed) -> Any:
    """Two experts (T2V-A14B, HiF4)."""
    return load_pipeline(packed["hif4"])


@pytest.fixture
def files(pipe, tmp_path: Path) -> dict[str, Path]:
    """Two adapters for all Linears of the experts' blocks, of different rank."""
    linears = loras.block_linears(pipe.transformer)
    return {
        "a": loras.write(tmp_path / "a.safetensors", loras.diffusers_names(loras.factors(linears, std=0.05))),
        "b": loras.write(
            tmp_path / "b.safetensors", loras.original_names(loras.factors(linears, rank=8, seed=1, std=0.05), alpha=4)
        ),
    }


def load(pipe: Any, file: Path, name: str, **options: Any) -> None:
    """Into both experts."""
    pipe.load_lora_weights(file, adapter_name=name, **options)
    pipe.load_lora_weights(file, adapter_name=name, load_into_transformer_2=True, **options)


@pytest.mark.parametrize("style", ["diffusers", "original", "original with alpha"])
@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_output_is_the_packed_product_plus_the_low_rank_one(pipe, tmp_path, style: str, expert: str) -> None:
    module, strength = getattr(pipe, expert), 0.7
    pairs = loras.factors(loras.block_linears(module), rank=6)
    alpha = 3.0 if "alpha" in style else None
    tensors = loras.diffusers_names(pairs) if style == "diffusers" else loras.original_names(pairs, alpha)
    plain = {name: copy.deepcopy(layer) for name, layer in loras.block_linears(module).items()}
    loras.write(tmp_path / "a.safetensors", tensors)
    pipe.load_lora_weights(
        tmp_path / "a.safetensors", adapter_name="a", load_into_transformer_2=expert == "transformer_2"
    )
    pipe.set_adapters("a", strength)
    assert len(pairs) == 20 and all(isinstance(layer, QuantLinear) for layer in plain.values())
    for name, (down, up) in pairs.items():
        x = torch.randn(2, 5, down.shape[1], generator=torch.Generator().manual_seed(2))
        low_rank = strength * (1.0 if alpha is None else alpha / 6) * (x @ down.T @ up.T)
        expected, found = plain[name](x) + low_rank, module.get_submodule(name)(x)
        assert low_rank.abs().max() > 0.1
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_in_bfloat16_and_on_protected_blocks(packed, generate, tmp_path: Path) -> None:
    pipe = load_pipeline(packed["mxfp4"], dtype=torch.bfloat16)  # one expert, block 1 unquantized
    before = generate(pipe)
    pairs = loras.factors(loras.block_linears(pipe.transformer), std=0.05)
    half = {name: tensor.bfloat16() for name, tensor in loras.diffusers_names(pairs).items()}
    pipe.load_lora_weights(loras.write(tmp_path / "a.safetensors", half))
    with_adapter = generate(pipe)
    assert with_adapter.isfinite().all() and not torch.equal(with_adapter, before)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), before)


def test_scales_several_adapters_hot_swap_and_unload(pipe, files, generate) -> None:
    before, bytes_before = generate(pipe), state_bytes(pipe)
    load(pipe, files["a"], "a")
    with_a = generate(pipe)
    assert not torch.equal(with_a, before)
    load(pipe, files["b"], "b")
    pipe.set_adapters(["a", "b"], [0.5, 0.5])
    both = generate(pipe)
    assert not torch.equal(both, with_a)
    pipe.set_adapters("a", {"transformer": 1.0, "transformer_2": 0.5})
    assert not torch.equal(generate(pipe), with_a)
    pipe.set_adapters(["a"], [1.0])
    assert torch.equal(generate(pipe), with_a)
    pipe.disable_lora()
    assert torch.equal(generate(pipe), before)
    pipe.enable_lora()
    pipe.delete_adapters("b")
    assert torch.equal(generate(pipe), with_a)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), before)
    assert state_bytes(pipe) == bytes_before


def test_hot_swap_is_loading_anew(pipe, files, generate, tmp_path: Path) -> None:
    linears = loras.block_linears(pipe.transformer)
    other = loras.write(tmp_path / "c.safetensors", loras.diffusers_names(loras.factors(linears, seed=5, std=0.05)))
    load(pipe, other, "x")
    wanted = generate(pipe)
    pipe.unload_lora_weights()
    load(pipe, files["a"], "x")
    load(pipe, other, "x", hotswap=True)
    assert torch.equal(generate(pipe), wanted)


def test_fusing_is_refused_before_anything_changes(pipe, files, generate) -> None:
    load(pipe, files["a"], "a")
    with_a = generate(pipe)
    layer = pipe.transformer.blocks[0].attn1.to_q
    attempts = (
        lambda: pipe.fuse_lora(lora_scale=0.5),
        lambda: pipe.fuse_lora(components=["transformer_2"]),
        lambda: pipe.transformer.fuse_lora(safe_fusing=True),
        layer.merge,
        lambda: layer.merge(safe_merge=True),
    )
    for attempt in attempts:
        with pytest.raises(UsageError, match=REFUSED) as refused:
            attempt()
        assert "ptq calibrate --lora" in str(refused.value) and "\n" not in str(refused.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.unfuse_lora()
    assert torch.equal(generate(pipe), with_a)


def test_unquantized_layers_are_not_fused_either(packed, tmp_path: Path, generate) -> None:
    """Otherwise half of the adapter would be in the weights when the first quantized layer refuses."""
    pipe = load_pipeline(packed["hif4"])
    pairs = loras.factors({"proj_out": pipe.transformer.proj_out, **loras.block_linears(pipe.transformer)})
    weight = pipe.transformer.proj_out.weight.clone()
    pipe.load_lora_weights(loras.write(tmp_path / "a.safetensors", loras.diffusers_names(pairs)))
    with pytest.raises(UsageError, match=REFUSED):
        pipe.fuse_lora()
    assert torch.equal(pipe.transformer.proj_out.base_layer.weight, weight)


def test_saving_with_an_adapter_is_refused_and_works_after_unloading(pipe, files, packed, tmp_path: Path) -> None:
    load(pipe, files["a"], "a")
    with pytest.raises(UsageError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    with pytest.raises(UsageError, match="unload_lora_weights"):
        pipe.transformer.save_pretrained(tmp_path / "one")
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(tmp_path / "saved", max_shard_size=120_000)
    for file in (packed["hif4"] / "transformer").glob("*.safetensors"):
        assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes()


def model_hooks(expert: Any) -> None:
    cpu_offload_with_hook(expert, CPU)


def layer_hooks(expert: Any) -> None:
    cpu_offload(expert, execution_device=CPU)


def group_hooks(expert: Any) -> None:
    expert.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("hooks", [model_hooks, layer_hooks, group_hooks])
def test_offloading_with_an_adapter(packed, pipe, files, generate, hooks: Callable[[Any], None]) -> None:
    """The hooks of the three modes of offloading, with the CPU as the device that computes."""
    offloaded = load_pipeline(packed["hif4"])
    for one in (pipe, offloaded):
        load(one, files["a"], "a")
    for expert in (offloaded.transformer, offloaded.transformer_2):
        hooks(expert)
    assert torch.equal(generate(offloaded), generate(pipe))


def test_adapter_into_an_offloaded_group_and_out_again(packed, pipe, files, generate) -> None:
    before, offloaded = generate(pipe), load_pipeline(packed["hif4"])
    for expert in (offloaded.transformer, offloaded.transformer_2):
        group_hooks(expert)
    for one in (pipe, offloaded):
        load(one, files["a"], "a")
    assert torch.equal(generate(offloaded), generate(pipe))
    offloaded.unload_lora_weights()
    assert torch.equal(generate(offloaded), before)


@pytest.mark.parametrize("kind", ["another width", "rank 0"])
def test_adapters_that_do_not_fit_change_nothing(pipe, generate, tmp_path: Path, kind: str) -> None:
    before = generate(pipe)
    pairs = loras.factors(loras.block_linears(pipe.transformer), rank=0 if kind == "rank 0" else 4)
    if kind == "another width":
        pairs = {name: (torch.zeros(4, 2 * a.shape[1]), b) for name, (a, b) in pairs.items()}
    file = loras.write(tmp_path / "a.safetensors", loras.diffusers_names(pairs))
    with pytest.raises((ValueError, RuntimeError)):  # diffusers' own words
        pipe.load_lora_weights(file)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), before)


def state_bytes(pipe: Any) -> dict[str, bytes]:
    return {
        f"{expert}.{name}": tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for expert in ("transformer", "transformer_2")
        for name, tensor in getattr(pipe, expert).state_dict().items()
        if tensor.numel()
    }
