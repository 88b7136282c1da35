"""Stages ``latents`` and ``conditions``: rendered clips and their first frames, encoded once for the denoisers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ptq.tiny.world import render, train_scenes

from . import vae as vae_stage
from .common import FRAMES, SIZE, Log, save_atomic

HARD = {("ring", "large"), ("triangle", "small")}
"""Scenes that are learnt last; each is drawn twice as often."""


def rendered(clips: int, seed: int) -> tuple[np.ndarray, Iterator[Tensor]]:
    """The clips to learn from: scene numbers [clips], and their frames in batches of 16, float32 [16, 3, T, H, W]."""
    scenes, rng = train_scenes(), np.random.default_rng([seed, 2])
    pool = np.array([i for i, s in enumerate(scenes) for _ in range(2 if (s.shape, s.size) in HARD else 1)])
    index = np.concatenate([rng.permutation(pool) for _ in range(-(-clips // len(pool)))])[:clips]

    def batches() -> Iterator[Tensor]:
        for lo in range(0, clips, 16):
            frames = np.stack([render(scenes[int(i)], rng, FRAMES, SIZE, SIZE) for i in index[lo : lo + 16]])
            yield torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0

    return index, batches()


@torch.no_grad()
def encode_clips(work: Path, clips: int, seed: int, init: Path | None = None) -> None:
    """Render ``clips`` clips of training scenes, encode them and store latents, scenes, mean and std.

    ``init``: the pipeline directory that training starts from; its latents' mean and std are kept.
    """
    stats = None
    if init is not None:
        config = json.loads((init / "vae/config.json").read_text(encoding="utf-8"))
        stats = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
    vae, log = vae_stage.load(work), Log(work / "latents.jsonl")
    index, batches = rendered(clips, seed)
    parts, began = [], time.time()
    for i, x in enumerate(batches):
        parts.append(vae.encode(x).latent_dist.mean)
        if i % 50 == 0:
            log(stage="latents", clips=16 * i, seconds=time.time() - began)
    z = torch.cat(parts)
    if stats is None:
        stats = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    mean, std = stats
    save_atomic({"z": z, "index": torch.from_numpy(index), "mean": mean, "std": std}, work / "latents.pt")
    log(stage="latents", clips=clips, seconds=time.time() - began, mean=mean.tolist(), std=std.tolist())


@torch.no_grad()
def encode_conditions(work: Path, seed: int) -> None:
    """Store the conditions that ``WanImageToVideoPipeline`` would make: first frame, then mid-grey ones, encoded.

    The seed of the latents stage draws the same clips again; first latent frames that differ are refused.
    """
    data, vae = torch.load(work / "latents.pt", weights_only=False), vae_stage.load(work)
    log, began, parts = Log(work / "conditions.jsonl"), time.time(), []
    for clips in rendered(len(data["index"]), seed)[1]:
        grey = clips.new_zeros(len(clips), 3, FRAMES - 1, SIZE, SIZE)
        parts.append(vae.encode(torch.cat([clips[:, :, :1], grey], 2)).latent_dist.mean)
    condition = torch.cat(parts)
    difference = float((condition[:, :, 0] - data["z"][:, :, 0]).abs().max())
    if difference > 1e-4:
        raise ValueError(f"the rendered clips are not those of latents.pt: first latent frames differ by {difference}")
    save_atomic({"condition": condition}, work / "conditions.pt")
    log(stage="conditions", clips=len(condition), seconds=time.time() - began)
