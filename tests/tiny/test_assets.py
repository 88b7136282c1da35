"""The shipped tiny pipeline: layout, sizes and structure (quick), then adherence of real pipeline calls (slow)."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from ptq.tiny import assets_dir, defaults
from ptq.tiny.detect import adherence
from ptq.tiny.grammar import held_out_prompts, parse_prompt


def _has_assets() -> bool:
    try:
        assets_dir("tiny")
    except FileNotFoundError:
        return False
    return True


needs_assets = pytest.mark.skipif(not _has_assets(), reason="the tiny pipeline has not been trained in this tree")


@pytest.fixture(scope="module")
def pipe():
    from diffusers import WanPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = WanPipeline.from_pretrained(assets_dir("tiny"), torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def generate(pipe, prompt: str, seed: int) -> np.ndarray:
    d = defaults("tiny")
    video = pipe(
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


@needs_assets
def test_layout_size_and_dtypes() -> None:
    from safetensors import safe_open

    root = assets_dir("tiny")
    index = json.loads((root / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and index["boundary_ratio"] == 0.875
    assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) <= 24e6
    for path in root.rglob("*.safetensors"):
        with safe_open(path, "pt") as f:
            assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}, path  # noqa: SIM118


@needs_assets
def test_structure_is_wan_two_experts(pipe) -> None:
    for model in (pipe.transformer, pipe.transformer_2):
        config = model.config
        assert config.cross_attn_norm is True and config.qk_norm == "rms_norm_across_heads"
        assert len(model.blocks) >= 6
        linears = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linears) == 10 * len(model.blocks)
        assert all(m.in_features % 64 == 0 and m.out_features % 64 == 0 for m in linears)
    a, b = pipe.transformer.state_dict(), pipe.transformer_2.state_dict()
    assert any(not torch.equal(a[k], b[k]) for k in a)
    pipe.scheduler.set_timesteps(defaults("tiny")["steps"])
    high = (pipe.scheduler.timesteps >= 875).sum().item()
    assert 3 <= high <= defaults("tiny")["steps"] - 3


@needs_assets
def test_a_clip_is_repeatable_and_right(pipe) -> None:
    prompt = held_out_prompts(1)[0]
    first = generate(pipe, prompt, 5)
    assert first.shape == (9, 64, 64, 3) and np.array_equal(first, generate(pipe, prompt, 5))
    assert not np.array_equal(first, generate(pipe, prompt, 6))


@needs_assets
@pytest.mark.slow
def test_adherence_of_the_original(pipe) -> None:
    scores = [
        adherence(generate(pipe, prompt, 1000 + i), parse_prompt(prompt))
        for i, prompt in enumerate(held_out_prompts(64))
    ]
    means = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
    assert means["colour_hit"] >= 0.95, means
    assert means["direction_hit"] >= 0.90, means
    assert means["shape_hit"] >= 0.85, means
