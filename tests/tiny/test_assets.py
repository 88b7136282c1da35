"""The shipped pipelines: layout, sizes and structure (quick), then adherence of real pipeline calls (slow)."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from ptq.tiny import assets_dir, defaults
from ptq.tiny.detect import adherence
from ptq.tiny.grammar import held_out_prompts, parse_prompt
from ptq.tiny.world import render


@pytest.fixture(scope="module", params=["tiny", "tiny-i2v"])
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = DiffusionPipeline.from_pretrained(assets_dir(model), dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def generate(pipe, model: str, prompt: str, seed: int) -> np.ndarray:
    d = defaults(model)
    start = {}
    if model == "tiny-i2v":
        clip = render(parse_prompt(prompt), seed, d["num_frames"], d["height"], d["width"])
        start = {"image": Image.fromarray(clip[0])}
    video = pipe(
        **start,
        prompt=prompt,
        negative_prompt=d["negative_prompt"],
        num_frames=d["num_frames"],
        height=d["height"],
        width=d["width"],
        num_inference_steps=d["steps"],
        guidance_scale=d["guidance_scale"],
        guidance_scale_2=d["guidance_scale_2"],
        max_sequence_length=d["max_sequence_length"],
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    return np.round(np.asarray(video) * 255.0).clip(0, 255).astype(np.uint8)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match="no embedded pipeline 'nope'"):
        assets_dir("nope")
    with pytest.raises(FileNotFoundError, match="no embedded pipeline"):
        defaults("nope")


def test_layout_size_and_dtypes(model: str) -> None:
    root = assets_dir(model)
    index = json.loads((root / "model_index.json").read_text())
    expected, limit = {"tiny": ("WanPipeline", 24e6), "tiny-i2v": ("WanImageToVideoPipeline", 12e6)}[model]
    assert index["_class_name"] == expected and index["boundary_ratio"] == 0.875
    # Parts that tiny-i2v shares with tiny are links and take no room.
    shared = {path for path in root.iterdir() if path.is_symlink()}
    own = [p for p in root.rglob("*") if p.is_file() and not shared & set(p.parents)]
    assert sum(p.stat().st_size for p in own) <= limit
    for path in own:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}, path  # noqa: SIM118


def test_structure_is_wan_two_experts(pipe, model: str) -> None:
    for expert in (pipe.transformer, pipe.transformer_2):
        config = expert.config
        assert config.cross_attn_norm is True and config.qk_norm == "rms_norm_across_heads"
        assert (config.in_channels, config.out_channels) == ({"tiny": 16, "tiny-i2v": 36}[model], 16)
        assert len(expert.blocks) >= 6
        linears = [m for m in expert.blocks.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linears) == 10 * len(expert.blocks)
        assert all(m.in_features % 64 == 0 and m.out_features % 64 == 0 for m in linears)
    a, b = pipe.transformer.state_dict(), pipe.transformer_2.state_dict()
    assert any(not torch.equal(a[k], b[k]) for k in a)
    pipe.scheduler.set_timesteps(defaults(model)["steps"])
    high = (pipe.scheduler.timesteps >= 875).sum().item()
    assert 3 <= high <= defaults(model)["steps"] - 3


def test_a_clip_is_repeatable_and_its_own(pipe, model: str) -> None:
    prompt = held_out_prompts(1)[0]
    first = generate(pipe, model, prompt, 5)
    assert first.shape == (9, 64, 64, 3) and np.array_equal(first, generate(pipe, model, prompt, 5))
    assert not np.array_equal(first, generate(pipe, model, prompt, 6))


@pytest.mark.slow
def test_adherence_of_the_original(pipe, model: str) -> None:
    scores = [
        adherence(generate(pipe, model, prompt, 1000 + i), parse_prompt(prompt))
        for i, prompt in enumerate(held_out_prompts(20))
    ]
    means = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
    assert means["colour_hit"] >= 0.95, means
    assert means["direction_hit"] >= 0.90, means
    assert means["shape_hit"] >= 0.85, means
