"""Stages ``trunk`` and the experts: flow matching on cached latents.

The trunk learns all noise levels; both experts start from its averaged weights and then learn only
their own range, split at BOUNDARY of the schedule; the image-to-video experts start from those.

x_t = (1 - s) x0 + s noise, target noise - x0.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from ptq.tiny.grammar import prompt_for
from ptq.tiny.world import Scene, train_scenes

from . import i2v
from .common import BOUNDARY, SHIFT, Z_DIM, Ema, Log, learning_rate, save_atomic, set_lr
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
STAGES = ("trunk", "high", "low", "i2v-high", "i2v-low")


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


def starting_weights(work: Path, stage: str, init: Path | None) -> dict[str, Tensor]:
    """What an expert starts from: its text-to-video weights in the pipeline directory ``init`` if that is given, else
    the trunk (high, low) or the trained text-to-video expert (i2v-high, i2v-low) in ``work``."""
    kind = stage.removeprefix("i2v-")
    if init is not None:
        folder = init / ("transformer" if kind == "high" else "transformer_2")
        weights = WanTransformer3DModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    else:
        weights = torch.load(work / f"{'trunk' if stage == kind else kind}.pt", weights_only=False)["ema"]
    return weights if stage == kind else i2v.widened(weights)


def train(
    work: Path,
    stage: str,
    steps: int,
    seed: int,
    batch: int,
    compiled: bool,
    init: Path | None,
    rate: float,
) -> None:
    """Train ``stage`` (one of STAGES) for ``steps`` steps in all; resumes from ``work/<stage>.pt``.

    Experts begin with `starting_weights`; the image-to-video ones also see the first frame. ``rate`` is a factor on the
    peak learning rates.
    """
    kind = stage.removeprefix("i2v-")
    low, high = {"trunk": (0.0, 1.0), "high": (BOUNDARY - 0.01, 1.0), "low": (0.0, BOUNDARY + 0.005)}[kind]
    number = STAGES.index(stage) + 3
    rate *= 1.0 if stage == "trunk" else 0.9
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    encoder = make_encoder(tokenizer, seed)
    conditioned = stage != kind
    model = WanTransformer3DModel(**(CONFIG | i2v.CHANGES if conditioned else CONFIG))
    if stage == "trunk":
        # A zero output at the start, and a small modulation, as in the original initialisation.
        torch.nn.init.zeros_(model.proj_out.weight)
        torch.nn.init.zeros_(model.proj_out.bias)
    else:
        model.load_state_dict(starting_weights(work, stage, init))
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
    mean, std = data["mean"].view(1, -1, 1, 1, 1), data["std"].view(1, -1, 1, 1, 1)
    z = (data["z"] - mean) / std
    if conditioned:
        condition = (torch.load(work / "conditions.pt", weights_only=False)["condition"] - mean) / std
        condition = torch.cat([i2v.mask(len(condition)), condition], 1)
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
        seen = (1 - s) * x0 + s * noise
        if conditioned:
            seen = torch.cat([seen, condition[torch.from_numpy(pick)]], 1)
        out = model(seen, sigma * 1000.0, text, return_dict=False)[0]
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
