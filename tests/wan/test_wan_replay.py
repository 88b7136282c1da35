"""ExpertReplay (head, blocks one at a time, tail) equals WanTransformer3DModel.forward bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import ptq  # noqa: F401  (registers the packed format)
from ptq.checkpoint.shards import ShardSet
from ptq.errors import PtqError
from ptq.store.calibration import DenoiserCall
from ptq.wan.layout import read_layout
from ptq.wan.replay import ExpertReplay, run_block, state_names
from ptq.wan.variants import VARIANTS

Source = Callable[[str], tuple[Path, str]]


def call(variant: str, seed: int = 0) -> DenoiserCall:
    """A call as the pipeline makes it; TI2V-5B gives every token its own timestep, I2V-14B has image tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, VARIANTS[variant].in_channels, 3, 8, 8, generator=generator)
    image = variant == "I2V-14B"
    text = torch.randn(1, 512 if image else 12, 64, generator=generator)
    timestep = torch.tensor([937.0])
    if variant == "TI2V-5B":
        timestep = torch.where(torch.arange(3 * 4 * 4) < 16, 0.0, 937.0).unsqueeze(0)
    return DenoiserCall(hidden, timestep, text, torch.randn(1, 5, 32, generator=generator) if image else None)


def run_model(model: WanTransformer3DModel, call: DenoiserCall, dtype: torch.dtype = torch.float32) -> Tensor:
    """The real model on a call."""
    tensors = {name: value for name, value in call._asdict().items() if value is not None}
    with torch.no_grad():
        tensors = {name: value if name == "timestep" else value.to(dtype) for name, value in tensors.items()}
        return model(**tensors, return_dict=False)[0]


def open_replay(directory: Path, expert: str = "transformer", dtype: torch.dtype = torch.float32) -> ExpertReplay:
    config = json.loads((directory / expert / "config.json").read_text())
    return ExpertReplay(ShardSet(directory / expert), config, dtype=dtype)


def replayed(replay: ExpertReplay, call: DenoiserCall) -> Tensor:
    hidden, context = replay.head("record", call)
    for index in range(replay.num_blocks):
        hidden = run_block(replay.load_block(index), hidden, context)
    return replay.tail(hidden, call)


CASES = [
    ("T2V-A14B", "transformer"),
    ("T2V-A14B", "transformer_2"),
    ("I2V-A14B", "transformer"),
    ("I2V-A14B", "transformer_2"),
    ("TI2V-5B", "transformer"),
    ("T2V-1.3B", "transformer"),
    ("I2V-14B", "transformer"),
]


@pytest.mark.parametrize(("variant", "expert"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original_model(random_pipelines, variant: str, expert: str, dtype: torch.dtype) -> None:
    directory = random_pipelines[variant] / expert
    model = WanTransformer3DModel.from_pretrained(directory, dtype=dtype).eval()
    arguments = call(variant)
    expected = run_model(model, arguments, dtype)
    found = replayed(open_replay(random_pipelines[variant], expert, dtype), arguments)
    assert found.dtype == expected.dtype and torch.equal(found, expected) and expected.std() > 0.01


@pytest.mark.parametrize(
    ("format_name", "variant", "expert"),
    [("hif4", "T2V-A14B", "transformer"), ("hif4", "T2V-A14B", "transformer_2"), ("mxfp4", "TI2V-5B", "transformer")],
)
def test_packed_model(packed, random_pipelines, format_name: str, variant: str, expert: str) -> None:
    directory = packed[format_name]
    model = WanTransformer3DModel.from_pretrained(directory / expert, dtype=torch.float32).eval()
    arguments = call(variant)
    expected = run_model(model, arguments)
    assert torch.equal(replayed(open_replay(directory, expert), arguments), expected)
    original = replayed(open_replay(random_pipelines[variant], expert), arguments)
    assert 1e-3 < ((expected - original).norm() / original.norm()).item() < 0.5


def test_a_call_without_image_tokens_is_refused(random_pipelines) -> None:
    replay = open_replay(random_pipelines["I2V-14B"])
    old = call("I2V-14B")._replace(encoder_hidden_states_image=None)
    with pytest.raises(PtqError, match="recorded without them"):
        replay.head("record", old)


def test_unused_tensors_of_a_release_are_left_out(random_pipelines, copy_of) -> None:
    """Released I2V weights of Wan 2.1 hold a norm that no code reads, as diffusers says (`norm_added_q`)."""
    directory, arguments = copy_of(random_pipelines["I2V-14B"]), call("I2V-14B")
    expected = replayed(open_replay(directory), arguments)
    name = "blocks.0.attn2.norm_added_q.weight"
    save_file({name: torch.ones(128)}, directory / "transformer" / "extra.safetensors")
    index = directory / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = "extra.safetensors"
    index.write_text(json.dumps(content))
    assert torch.equal(replayed(open_replay(directory), arguments), expected)


def test_contexts_are_kept_by_name(random_pipelines) -> None:
    replay = open_replay(random_pipelines["T2V-A14B"])
    a, b = call("T2V-A14B", 1), call("T2V-A14B", 2)
    context_a, context_b = replay.context("a", lambda: [a]), replay.context("b", lambda: [b])
    assert not torch.equal(context_a.context, context_b.context)

    def not_again() -> list[DenoiserCall]:
        raise AssertionError("the arguments were read again")

    assert replay.context("a", not_again) is context_a


def test_blocks_are_independent(random_pipelines) -> None:
    replay = open_replay(random_pipelines["T2V-A14B"])
    first, again = replay.load_block(0), replay.load_block(0)
    with torch.no_grad():
        first.attn1.to_q.weight.zero_()
    assert again.attn1.to_q.weight.abs().sum() > 0 and replay.load_block(0).attn1.to_q.weight.abs().sum() > 0


def test_state_names_are_those_of_the_model(packed, random_pipelines) -> None:
    for directory in (random_pipelines["I2V-14B"], packed["hif4"], packed["mxfp4"]):
        config = read_layout(directory).experts["transformer"]
        model = WanTransformer3DModel.from_pretrained(directory / "transformer", dtype=torch.float32)
        found = state_names(config, open_replay(directory).packed)
        assert found == list(model.state_dict())


def change_tensor(directory: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> Path:
    """Apply `change` to one tensor of the transformer in its shard (None removes it); returns the shard."""
    entry = ShardSet(directory / "transformer").entries[name]
    tensors = load_file(entry.file)
    value = change(tensors.pop(name))
    if value is not None:
        tensors[name] = value
    save_file(tensors, entry.file, metadata={"format": "pt"})
    index = directory / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    if value is None:
        content = json.loads(index.read_text())
        del content["weight_map"][name]
        index.write_text(json.dumps(content))
    return entry.file


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_named(random_pipelines, copy_of, bad: float) -> None:
    directory, name = copy_of(random_pipelines["T2V-A14B"]), "blocks.1.ffn.net.2.weight"

    def spoil(tensor: Tensor) -> Tensor:
        tensor[5, 7] = bad
        return tensor

    shard = change_tensor(directory, name, spoil)
    replay = open_replay(directory)
    replay.load_block(0)
    with pytest.raises(PtqError) as caught:
        replay.load_block(1)
    assert str(shard) in str(caught.value) and f"tensor {name} " in str(caught.value)


@pytest.mark.parametrize("name", ["blocks.1.attn2.to_k.weight", "proj_out.weight", "blocks.0.scale_shift_table"])
def test_tensor_of_another_shape_is_named(random_pipelines, copy_of, name: str) -> None:
    directory = copy_of(random_pipelines["T2V-A14B"])
    shard = change_tensor(directory, name, lambda tensor: tensor[..., :-1].contiguous())
    with pytest.raises(PtqError, match="shape") as caught:
        open_replay(directory)
    assert str(shard) in str(caught.value) and f"tensor {name} " in str(caught.value)


@pytest.mark.parametrize("name", ["blocks.1.attn2.to_k.weight", "patch_embedding.bias"])
def test_missing_tensor_is_named(random_pipelines, copy_of, name: str) -> None:
    directory = copy_of(random_pipelines["T2V-A14B"])
    change_tensor(directory, name, lambda _: None)
    with pytest.raises(PtqError, match="has no tensor") as caught:
        open_replay(directory)
    assert f"tensor {name}," in str(caught.value)
