"""Estimates against what torch counts, what the recorder sees, and what the loader allocates."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from random_model import make_random_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from ptq import ui
from ptq.cli.main import app
from ptq.errors import UsageError
from ptq.wan import estimates, speed
from ptq.wan.block import block_inputs
from ptq.wan.estimates import (
    LIBRARY_BYTES,
    CallSize,
    call_size,
    component_bytes,
    forward_flops,
    hessian_flops,
    memory_facts,
    sampling_memory,
)
from ptq.wan.layout import ModelLayout, read_layout
from ptq.wan.loading import find_local_model, load_pipeline
from ptq.wan.pipeline import OFFLOAD_MODES
from ptq.wan.presets import load_preset
from ptq.wan.replay import run_block
from ptq.wan.variants import VARIANTS

CONFIG = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 192, "num_layers": 2, "text_dim": 32}
LATENT, TEXT = (16, 3, 8, 8), 24


IMAGE = {"image_dim": 32, "added_kv_proj_dim": 64}
BLOCKS = pytest.mark.parametrize(
    ("config", "size"),
    [
        (CONFIG, CallSize(3 * 4 * 4, TEXT, LATENT)),
        ({**CONFIG, **IMAGE}, CallSize(3 * 4 * 4, 512, LATENT, image=5)),  # such models split their context at 512
    ],
    ids=["text", "text and image"],
)


def run(model: WanTransformer3DModel, size: CallSize) -> None:
    image = {"encoder_hidden_states_image": torch.randn(1, size.image, 32)} if size.image else {}
    with torch.no_grad():
        model(torch.randn(1, *size.latent), torch.tensor([500]), torch.randn(1, size.text, 32), **image)


def counted(config: dict, size: CallSize, layers: int) -> int:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**config, "num_layers": layers}).eval()
    # The plain attention kernel is made of matrix products, which the counter sees.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model, size)
    return counter.get_total_flops()


@BLOCKS
def test_forward_operations_equal_what_torch_counts_for_a_block(config: dict, size: CallSize):
    one_block = counted(config, size, 3) - counted(config, size, 2)
    assert forward_flops({**config, "num_layers": 1}, size) == pytest.approx(one_block, rel=1e-6)
    assert forward_flops({**config, "num_layers": 5}, size) == pytest.approx(5 * one_block, rel=1e-6)


@BLOCKS
def test_hessian_operations_follow_the_inputs_of_a_real_block(config: dict, size: CallSize):
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**config, "num_layers": 1}).eval()
    operations = []
    for item in block_inputs(config).values():
        module = model.blocks[0].get_submodule(item.linears[0])
        module.register_forward_pre_hook(lambda _, args: operations.append(args[0].numel() * args[0].shape[-1]))
    run(model, size)
    assert len(operations) == (8 if size.image else 7)
    assert hessian_flops({**config, "num_layers": 1}, size) == sum(operations)


@pytest.mark.parametrize("variant", ["T2V-A14B", "I2V-A14B", "TI2V-5B", "I2V-14B"])
def test_call_size_is_what_the_denoiser_gets(random_pipelines: dict[str, Path], variant: str):
    layout = read_layout(random_pipelines[variant])
    pipe = load_pipeline(random_pipelines[variant])
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs),
        with_kwargs=True,
    )
    preset = layout.preset.model_copy(update={"num_frames": 5, "height": 32, "width": 64})
    arguments = {"prompt": "a", "height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 1}
    if layout.needs_image:
        from PIL import Image

        arguments["image"] = Image.new("RGB", (64, 32))
    pipe.set_progress_bar_config(disable=True)
    pipe(**arguments, max_sequence_length=preset.max_sequence_length, output_type="latent")
    size = call_size(layout, preset)
    image = seen[0].get("encoder_hidden_states_image")
    assert size.latent == tuple(seen[0]["hidden_states"].shape[1:])
    assert size.text == seen[0]["encoder_hidden_states"].shape[1]
    assert size.image == (0 if image is None else image.shape[1]) == (5 if variant == "I2V-14B" else 0)


def test_tokens_of_the_real_variants():
    """Without vae/config.json the A14B strides are taken; numbers from the Wan documentation."""
    preset = load_preset("T2V-A14B")
    layout = ModelLayout(
        Path("nowhere"),
        VARIANTS["T2V-A14B"],
        {"transformer": {"in_channels": 16, "patch_size": [1, 2, 2]}},
        "",
        preset,
        0.875,
    )
    assert call_size(layout, preset).tokens == 32760
    big = preset.model_copy(update={"height": 720, "width": 1280})
    assert call_size(layout, big).tokens == 75600


def test_component_bytes_equal_the_loaded_pipeline(packed: dict[str, Path]):
    pipe = load_pipeline(packed["hif4"], dtype=torch.bfloat16)
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        module = getattr(pipe, name)
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in module.state_dict().values()}
        loaded = sum(tensors.values())  # tied text embeddings are one, under one name or two
        # Norms and modulation stay float32.
        assert component_bytes(packed["hif4"], 2)[name] == pytest.approx(loaded, rel=0.25)


def test_memory_follows_device_and_offload(random_pipelines: dict[str, Path]):
    layout = read_layout(random_pipelines["T2V-A14B"])
    need = {mode: sampling_memory(layout, layout.preset, "cuda", mode, decode=True) for mode in OFFLOAD_MODES}
    assert [*need] == ["none", "model", "group", "sequential"]
    assert need["none"].vram > need["model"].vram > need["sequential"].vram > 0
    assert need["none"].vram > need["group"].vram > need["sequential"].vram
    on_cpu = sampling_memory(layout, layout.preset, "cpu", "none", decode=True)
    assert on_cpu.vram == 0 and on_cpu.ram > need["none"].ram


def test_the_peak_is_the_larger_of_encoder_and_denoiser(random_pipelines: dict[str, Path], monkeypatch):
    """With the sizes of A14B, which no test has: 11.4 GB of text encoder against one expert of packed weights."""
    layout = read_layout(random_pipelines["T2V-A14B"])
    real = {"text_encoder": 11_400, "transformer": 8_000, "transformer_2": 8_000, "vae": 500}
    monkeypatch.setattr(estimates, "component_bytes", lambda *_: {name: size * 10**6 for name, size in real.items()})
    small = layout.preset.model_copy(update={"height": 32, "width": 32, "num_frames": 5})
    one = sampling_memory(layout, small, "cuda", "model", decode=True)
    assert (one.encoding, one.vram) == (11_400 * 10**6, 11_400 * 10**6)
    assert 8_000 * 10**6 < one.denoising < 8_100 * 10**6
    assert one.describe().startswith(f"{ui.format_bytes(11_400 * 10**6)}, the larger of")
    both = sampling_memory(layout, small, "cuda", "none", decode=True)
    assert both.vram == both.denoising and 16_500 * 10**6 < both.vram < 16_600 * 10**6
    assert both.ram == LIBRARY_BYTES + 16_500 * 10**6  # of two phases too


def test_doctor_says_what_a_checkpoint_needs_and_what_fits(packed: dict[str, Path]):
    result = CliRunner().invoke(app, ["doctor", str(packed["hif4"]), "--json"])
    facts = json.loads(result.stdout)
    layout = read_layout(packed["hif4"])
    for mode in OFFLOAD_MODES:
        need = sampling_memory(layout, layout.preset, "cuda", mode, decode=True)
        assert facts[f"GPU memory for a video, --offload {mode}"].startswith(need.describe())
    assert "RAM for a video, on a CPU" in facts
    needs = sorted(sampling_memory(layout, layout.preset, "cuda", mode, decode=True).vram for mode in OFFLOAD_MODES)
    fits = [text.endswith("; fits this GPU") for text in memory_facts(layout, needs[1]).values()]
    assert sum(fits) == sum(need <= needs[1] for need in needs) < 4
    assert any(text.endswith(" s (48 tokens)") for name, text in facts.items() if name.startswith("time of a block"))


def test_doctor_advises_the_fastest_offload_that_fits(packed: dict[str, Path]):
    layout = read_layout(packed["hif4"])
    needs = {mode: sampling_memory(layout, layout.preset, "cuda", mode, decode=True).vram for mode in OFFLOAD_MODES}
    for size in needs.values():
        taken = memory_facts(layout, size)["--offload to take"]
        assert needs[taken] <= size and all(needs[mode] > size for mode in OFFLOAD_MODES[: OFFLOAD_MODES.index(taken)])
    assert "none fits" in memory_facts(layout, 1)["--offload to take"]
    assert "--offload to take" not in memory_facts(layout)


def test_doctor_takes_originals_that_are_here_and_downloads_nothing():
    facts = json.loads(CliRunner().invoke(app, ["doctor", "tiny", "--json"]).stdout)
    assert any(name.startswith("time of a video") for name in facts) and not any("checkpoint" in name for name in facts)
    with pytest.raises(UsageError, match="on this machine"):
        find_local_model("Wan-AI/Wan2.2-T2V-A14B-Diffusers")


def test_a_group_is_two_blocks_and_what_is_in_none(tmp_path: Path):
    model = make_random_pipeline(tmp_path / "model", "TI2V-5B", layers=5, width=64)
    layout, pipe = read_layout(model), load_pipeline(model, dtype=torch.bfloat16)
    sizes = [2 * sum(p.numel() for p in block.parameters()) for block in pipe.transformer.blocks]
    whole = 2 * sum(p.numel() for p in pipe.transformer.parameters())
    vae = 4 * sum(p.numel() for p in pipe.vae.parameters())
    wanted = whole - sum(sizes) + 2 * max(sizes) + vae
    need = {mode: sampling_memory(layout, layout.preset, "cuda", mode, decode=True) for mode in ("group", "sequential")}
    assert need["group"].denoising - need["sequential"].denoising == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("variant", ["T2V-A14B", "TI2V-5B", "I2V-14B"])
def test_a_call_of_few_tokens_is_timed_whole_and_a_long_one_scaled_by_operations(tmp_path, monkeypatch, variant):
    layout = read_layout(make_random_pipeline(tmp_path / "model", variant, layers=3, width=64))
    ran: list[int] = []
    monkeypatch.setattr(speed, "run_block", lambda block, hidden, context: run_block(block, note(ran, hidden), context))
    ticks = itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))  # the second forward takes one second
    short = call_size(layout, layout.preset.with_overrides(height=64, width=64, num_frames=1))
    config = next(iter(layout.experts.values()))
    assert speed.call_seconds(layout, short, "cpu") == pytest.approx(config["num_layers"])
    assert ran == [short.tokens] * 2
    long = call_size(layout, layout.preset.with_overrides(height=704, width=1280, num_frames=81))
    assert long.tokens > speed.CPU_TOKENS
    seconds = speed.call_seconds(layout, long, "cpu")
    assert 400 < ran[-1] <= speed.CPU_TOKENS
    probed = replace(long, tokens=ran[-1])
    assert seconds == pytest.approx(forward_flops(config, long) / forward_flops({**config, "num_layers": 1}, probed))


def note(ran: list[int], hidden: torch.Tensor) -> torch.Tensor:
    ran.append(hidden.shape[1])
    return hidden
