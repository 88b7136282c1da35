"""What the training stages share: settings, the JSONL log, atomic checkpoints, learning-rate schedule, EMA."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

FRAMES, SIZE, FPS = 9, 64, 8
Z_DIM, LATENT_FRAMES, LATENT_SIZE = 16, 3, 8
MAX_TOKENS = 24
SHIFT = 4.0
BOUNDARY = 0.875
VAE_CONFIG: dict[str, Any] = dict(
    base_dim=16,
    decoder_base_dim=16,
    z_dim=Z_DIM,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    attn_scales=[],
    temperal_downsample=[True, True],
    is_residual=True,
    # As in Wan 2.2's 5B VAE: 2x2 pixels become channels first, so the network works at half the size.
    patch_size=2,
    in_channels=12,
    out_channels=12,
    latents_mean=[0.0] * Z_DIM,
    latents_std=[1.0] * Z_DIM,
)


class Log:
    """Append-only JSONL of one stage; echoes each line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, **fields: Any) -> None:
        fields = {k: round(v, 6) if isinstance(v, float) else v for k, v in fields.items()}
        line = json.dumps({"time": round(time.time(), 1), **fields})
        with self.path.open("a", encoding="utf-8") as f:
            f.write(line + "\n")
        print(line, flush=True)


def save_atomic(obj: Any, path: Path) -> None:
    """torch.save through a temporary file, so that a kill leaves the previous checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(path.suffix + ".tmp")
    torch.save(obj, tmp)
    os.replace(tmp, path)


def learning_rate(step: int, total: int, peak: float, warmup: int = 50, floor: float = 0.05) -> float:
    """Linear warm-up, then cosine down to ``floor * peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def set_lr(opt: torch.optim.Optimizer, lr: float) -> None:
    for group in opt.param_groups:
        group["lr"] = lr


class Ema:
    """Exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for k, v in module.state_dict().items():
            self.shadow[k].lerp_(v, 1 - decay)
