"""Stage ``vae``: train a small AutoencoderKLWan on rendered clips, then measure it.

The latent is kept near unit scale by a small penalty and made robust by fixed noise of 0.1; there
is no KL term. The kernels learn by Muon.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from ptq.tiny.world import held_out_scenes, render, train_scenes

from .common import FRAMES, SIZE, VAE_CONFIG, Ema, Log, learning_rate, save_atomic, set_lr
from .muon import Muon

NOISE = 0.1
BATCH = 3
MUON_LR, ADAM_LR = 0.015, 1e-3
ENCODER = ("encoder.", "quant_conv.")


def clip_batch(rng: np.random.Generator, n: int, frames: int, split: str = "train") -> torch.Tensor:
    """``n`` rendered clips, float32 ``[n, 3, T, H, W]`` in [-1, 1]; shorter clips are cut from 9-frame ones."""
    start = int(rng.integers(FRAMES - frames + 1))
    scenes = held_out_scenes() if split == "held_out" else train_scenes()
    clips = []
    for _ in range(n):
        full = render(scenes[int(rng.integers(len(scenes)))], rng, FRAMES, SIZE, SIZE)
        clips.append(full[start : start + frames])
    x = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return x.float() / 127.5 - 1.0


def decode_raw(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """The decoder without the final clamp, whose gradient is zero where it acts."""
    vae.clear_cache()
    x = vae.post_quant_conv(z)
    out = []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        kwargs = {"first_chunk": True} if i == 0 else {}
        out.append(vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **kwargs))
    vae.clear_cache()
    return unpatchify(torch.cat(out, 2), patch_size=vae.config.patch_size)


def loss_fn(
    vae: AutoencoderKLWan, x: torch.Tensor, gen: torch.Generator, frozen: bool = False
) -> tuple[torch.Tensor, float]:
    """Weighted L1 + MSE (coloured pixels count more) plus the scale penalty; also the plain MSE."""
    with torch.set_grad_enabled(not frozen):
        mean = vae.encode(x).latent_dist.mean
    y = decode_raw(vae, mean + NOISE * torch.randn(mean.shape, generator=gen))
    chroma = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).clamp(0, 1)
    weight = 1 + 3 * chroma
    weight = weight / weight.mean()
    err = y - x
    rec = (weight * (err.abs() + 2 * err.square())).mean()
    return rec + 1e-3 * mean.square().mean(), float(err.detach().square().mean())


@torch.no_grad()
def measure(vae: AutoencoderKLWan, seed: int = 99, n: int = 16) -> float:
    """Mean reconstruction PSNR in dB over ``n`` held-out clips."""
    x = clip_batch(np.random.default_rng(seed), n, FRAMES, "held_out")
    y = vae.decode(vae.encode(x).latent_dist.mean).sample
    mse = (y - x).square().mean((1, 2, 3, 4)) / 4
    return float((-10 * mse.log10()).mean())


def optimisers(vae: AutoencoderKLWan) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the convolutions' kernels (flattened to matrices), AdamW for everything else; with peak rates."""
    kernels = [p for p in vae.parameters() if p.ndim >= 4 and p.shape[0] >= 8 and p[0].numel() >= 8]
    chosen = {id(p) for p in kernels}
    rest = [p for p in vae.parameters() if id(p) not in chosen]
    return [(Muon(kernels, lr=MUON_LR), MUON_LR), (torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98)), ADAM_LR)]


def train(work: Path, steps: int, seed: int, freeze_at: int, init: Path | None = None, rate: float = 1.0) -> None:
    """Train for ``steps`` steps in all, continuing from ``work/vae.pt`` when it exists.

    From step ``freeze_at`` on the averaged encoder is kept as it is, so that latents can be cached and
    denoisers trained while the decoder goes on learning. ``init``: a pipeline directory whose VAE to start
    from; ``rate``: factor on the peak learning rates.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    if init is not None:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(init / "vae", dtype=torch.float32).state_dict())
    opts = optimisers(vae)
    ema = Ema(vae, 0.99)
    log, path, first = Log(work / "vae.jsonl"), work / "vae.pt", 0
    if path.is_file():
        state = torch.load(path, weights_only=False)
        vae.load_state_dict(state["model"])
        for (opt, _), saved in zip(opts, state.get("opts", []), strict=False):
            opt.load_state_dict(saved)
        ema.shadow, first = state["ema"], state["step"]
    else:
        log(stage="vae", params=sum(p.numel() for p in vae.parameters()), steps=steps)
    began, mses = time.time(), []
    for step in range(first, steps):
        if step == freeze_at:
            averaged = {k: v for k, v in ema.shadow.items() if k.startswith(ENCODER)}
            vae.load_state_dict(averaged, strict=False)
        # Each step has its own generators, so that a resumed run sees the same data.
        rng, gen = np.random.default_rng([seed, 1, step]), torch.Generator().manual_seed(seed * 1_000_003 + step)
        x = clip_batch(rng, BATCH, FRAMES)
        for opt, peak in opts:
            set_lr(opt, learning_rate(step, steps, rate * peak))
            opt.zero_grad(set_to_none=True)
        loss, mse = loss_fn(vae, x, gen, step >= freeze_at)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for opt, _ in opts:
            opt.step()
        ema.update(vae, step)
        mses.append(mse)
        if (step + 1) % 25 == 0:
            psnr = float(-10 * np.log10(np.mean(mses) / 4))
            pace = (time.time() - began) / (step + 1 - first)
            log(stage="vae", step=step + 1, loss=float(loss.detach()), psnr=psnr, per_step=pace)
            mses = []
        if (step + 1) % 100 == 0 or step + 1 == steps:
            saved = [opt.state_dict() for opt, _ in opts]
            state = {"model": vae.state_dict(), "opts": saved, "ema": ema.shadow, "step": step + 1}
            save_atomic(state, path)
    vae.load_state_dict(ema.shadow)
    log(stage="vae", step=steps, held_out_psnr=measure(vae.eval()))


def load(work: Path) -> AutoencoderKLWan:
    """The averaged VAE of the last checkpoint, in eval mode, float32."""
    vae = AutoencoderKLWan(**VAE_CONFIG)
    path = work / "vae.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the vae stage first")
    vae.load_state_dict(torch.load(path, weights_only=False)["ema"])
    return vae.eval().requires_grad_(False)
