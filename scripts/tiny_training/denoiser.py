"""Stages ``latents``, ``trunk``, ``high`` and ``low``: flow matching on cached latents.

The trunk learns all noise levels; both experts start from its averaged weights and then learn only
their own range, split at BOUNDARY of the schedule. x_t = (1 - s) x0 + s noise, target noise - x0.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from ptq.tiny.grammar import prompt_for
from ptq.tiny.world import Scene, render, train_scenes

from . import vae as vae_stage
from .common import BOUNDARY, FRAMES, SHIFT, SIZE, Z_DIM, Ema, Log, learning_rate, save_atomic, set_lr
from .muon import Muon
from .text import TEXT_DIM, embed, make_encoder, make_tokenizer

CONFIG = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=48,
    in_channels=Z_DIM,
    out_channels=Z_DIM,
    text_dim=TEXT_DIM,
    freq_dim=128,
    ffn_dim=512,
    num_layers=6,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=1e-6,
    rope_max_seq_len=64,
)
DROP_PROMPT = 0.1


@torch.no_grad()
def encode_clips(work: Path, clips: int, seed: int) -> None:
    """Render ``clips`` clips of training scenes, encode them and store latents, scenes, mean and std."""
    vae, scenes, log = vae_stage.load(work), train_scenes(), Log(work / "latents.jsonl")
    rng = np.random.default_rng([seed, 2])
    index = np.concatenate([rng.permutation(len(scenes)) for _ in range(-(-clips // len(scenes)))])[:clips]
    parts, began = [], time.time()
    for lo in range(0, clips, 16):
        frames = np.stack([render(scenes[int(i)], rng, FRAMES, SIZE, SIZE) for i in index[lo : lo + 16]])
        x = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
        parts.append(vae.encode(x).latent_dist.mean)
        if (lo // 16) % 50 == 0:
            log(stage="latents", clips=lo, seconds=time.time() - began)
    z = torch.cat(parts)
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    save_atomic({"z": z, "index": torch.from_numpy(index), "mean": mean, "std": std}, work / "latents.pt")
    log(stage="latents", clips=clips, seconds=time.time() - began, mean=mean.tolist(), std=std.tolist())


def sigmas(n: int, low: float, high: float, gen: torch.Generator) -> torch.Tensor:
    """Noise levels of the inference schedule, uniform before the shift, within [low, high]."""

    def unshift(s: float) -> float:
        return s / (SHIFT - (SHIFT - 1) * s)

    # Stratified: one draw in each of n equal parts.
    part = (torch.arange(n) + torch.rand(n, generator=gen)) / n
    u = unshift(low) + (unshift(high) - unshift(low)) * part
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def optimisers(
    model: WanTransformer3DModel, muon_lr: float, adam_lr: float
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the block Linears' weights, AdamW for everything else, each with its peak rate."""
    inner = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [(Muon(inner, lr=muon_lr), muon_lr), (adam, adam_lr)]


def train(work: Path, stage: str, steps: int, seed: int, batch: int = 48, compiled: bool = False) -> None:
    """Train ``stage`` ("trunk", "high" or "low") for ``steps`` steps in all; resumes from ``work/<stage>.pt``."""
    low, high = {"trunk": (0.0, 1.0), "high": (BOUNDARY - 0.01, 1.0), "low": (0.0, BOUNDARY + 0.005)}[stage]
    number = {"trunk": 3, "high": 4, "low": 5}[stage]
    rate = 1.0 if stage == "trunk" else 0.9
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    encoder = make_encoder(tokenizer, seed)
    model = WanTransformer3DModel(**CONFIG)
    if stage == "trunk":
        # A zero output at the start, and a small modulation, as in the original initialisation.
        torch.nn.init.zeros_(model.proj_out.weight)
        torch.nn.init.zeros_(model.proj_out.bias)
    else:
        model.load_state_dict(torch.load(work / "trunk.pt", weights_only=False)["ema"])
    opts = optimisers(model, 0.02 * rate, 2e-3 * rate)
    ema = Ema(model, 0.997)
    log, path, first = Log(work / f"{stage}.jsonl"), work / f"{stage}.pt", 0
    if path.is_file():
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state["model"])
        for (opt, _), saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        ema.shadow, first = state["ema"], state["step"]
    else:
        log(stage=stage, params=sum(p.numel() for p in model.parameters()), steps=steps, batch=batch)
    if compiled:
        for block in model.blocks:
            block.compile()
    data = torch.load(work / "latents.pt", weights_only=False)
    z = (data["z"] - data["mean"].view(1, -1, 1, 1, 1)) / data["std"].view(1, -1, 1, 1, 1)
    scenes: list[Scene] = [train_scenes()[int(i)] for i in data["index"]]
    began, losses = time.time(), []
    for step in range(first, steps):
        rng = np.random.default_rng([seed, number, step])
        gen = torch.Generator().manual_seed(seed * 1_000_003 + number * 100_003 + step)
        pick = rng.integers(len(scenes), size=batch)
        prompts = ["" if rng.random() < DROP_PROMPT else prompt_for(scenes[int(i)], rng) for i in pick]
        x0 = z[torch.from_numpy(pick)]
        noise = torch.randn(x0.shape, generator=gen)
        sigma = sigmas(batch, low, high, gen)
        s = sigma.view(-1, 1, 1, 1, 1)
        text = embed(tokenizer, encoder, prompts)
        out = model((1 - s) * x0 + s * noise, sigma * 1000.0, text, return_dict=False)[0]
        loss = (out - (noise - x0)).square().mean()
        for opt, peak in opts:
            set_lr(opt, learning_rate(step, steps, peak, floor=0.5 if stage == "trunk" else 0.01))
            opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, _ in opts:
            opt.step()
        ema.update(model, step)
        losses.append(float(loss.detach()))
        if (step + 1) % 25 == 0:
            pace = (time.time() - began) / (step + 1 - first)
            log(stage=stage, step=step + 1, loss=float(np.mean(losses)), per_step=pace)
            losses = []
        if (step + 1) % 50 == 0 or step + 1 == steps:
            saved = [opt.state_dict() for opt, _ in opts]
            state = {"model": model.state_dict(), "opts": saved, "ema": ema.shadow, "step": step + 1}
            save_atomic(state, path)
