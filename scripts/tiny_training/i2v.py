"""What the image-to-video experts add: 20 more input channels (first-frame mask and condition) and a narrower
feed-forward, started from the text-to-video experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import LATENT_FRAMES, LATENT_SIZE, Z_DIM

MASK_CHANNELS = 4
FFN = 320
CHANGES = {"in_channels": 2 * Z_DIM + MASK_CHANNELS, "ffn_dim": FFN}
"""Differences to the text-to-video configuration; 320 keeps both experts under 12 MB in bf16."""


def mask(batch: int) -> Tensor:
    """float32 [batch, 4, latent frames, h, w], as ``WanImageToVideoPipeline`` makes it: 1 in the first latent frame."""
    out = torch.zeros(batch, MASK_CHANNELS, LATENT_FRAMES, LATENT_SIZE, LATENT_SIZE)
    out[:, :, 0] = 1.0
    return out


def widened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a text-to-video expert -> a start for an image-to-video one.

    The new input channels start at zero; of each feed-forward the FFN channels with the largest product of input and
    output norms stay.
    """
    out = dict(state)
    patch = state["patch_embedding.weight"]
    out["patch_embedding.weight"] = patch.new_zeros(len(patch), CHANGES["in_channels"], *patch.shape[2:])
    out["patch_embedding.weight"][:, :Z_DIM] = patch
    for name in [k for k in state if k.endswith("ffn.net.0.proj.weight")]:
        stem = name.removesuffix("0.proj.weight")
        up, bias, down = state[name], state[f"{stem}0.proj.bias"], state[f"{stem}2.weight"]
        keep = (up.norm(dim=1) * down.norm(dim=0)).topk(FFN).indices.sort().values
        out[name], out[f"{stem}0.proj.bias"], out[f"{stem}2.weight"] = up[keep], bias[keep], down[:, keep]
    return out
