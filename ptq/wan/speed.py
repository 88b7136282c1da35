"""How long a denoiser call and a video take here, from a short forward of the model's own first block.

The block is loaded as it is (bfloat16, float32, or packed with the backend that will run it), so the rate is that of the real
kernels: products, quantizers, attention and everything between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ptq import ui
from ptq.checkpoint.shards import ShardSet
from ptq.runtime.backends import unreported
from ptq.store.calibration import DenoiserCall
from ptq.wan.block import video_tokens
from ptq.wan.estimates import CallSize, call_size, forward_flops
from ptq.wan.replay import ExpertReplay, run_block

if TYPE_CHECKING:
    from ptq.wan.layout import ModelLayout

CPU_TOKENS = 512
"""Of the probe's call on a CPU, at most; a GPU runs the whole call."""
TIMESTEP = 500


def call_seconds(layout: ModelLayout, size: CallSize, device: str) -> float:
    """Seconds of one denoiser call of `size`, without its head and tail.

    Times the second forward of the first expert's block 0 and scales it by operations: to the call's tokens, and to all blocks.

    Raises:
        PtqError: the block's weights are missing or damaged.
    """
    expert, config = next(iter(layout.experts.items()))
    probed = _probed(config["patch_size"], size, CPU_TOKENS if device == "cpu" else size.tokens)
    probed = replace(probed, tokens=video_tokens(config, probed.latent))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    replay = ExpertReplay(ShardSet(layout.path / expert), config, device, dtype)
    hidden, context = replay.head("probe", _random_call(config, probed))
    block = replay.load_block(0)
    with unreported():
        run_block(block, hidden, context)  # compiles and fills caches
        begin = time.perf_counter()
        run_block(block, hidden, context).flatten()[0].item()  # waits for the device
    seconds = time.perf_counter() - begin
    return seconds * forward_flops(config, size) / forward_flops({**config, "num_layers": 1}, probed)


def time_facts(layout: ModelLayout, device: str) -> dict[str, str]:
    """How long a block and a video of the model's defaults take on a device, without text encoder and VAE."""
    preset, config = layout.preset, next(iter(layout.experts.values()))
    size = call_size(layout, preset)
    call = call_seconds(layout, size, device)
    block, seconds = call / int(config["num_layers"]), preset.calls * call
    total = f"{seconds:.2g} s" if seconds < 10 else ui.format_seconds(seconds)
    video = f"{preset.width}x{preset.height}, {preset.num_frames} frames, {preset.steps} steps"
    return {
        f"time of a block on {device}, estimated": f"{block:.3g} s ({size.tokens} tokens)",
        f"time of a video on {device}, estimated": f"{total} ({video}; encoder and VAE apart)",
    }


def _probed(patch: Sequence[int], size: CallSize, limit: int) -> CallSize:
    """The call itself, or where it has more tokens than the limit, one of one latent frame, a square."""
    if size.tokens <= limit:
        return size
    side = math.isqrt(limit)
    return replace(size, latent=(size.latent[0], patch[0], side * patch[1], side * patch[2]))


def _random_call(config: Mapping[str, Any], size: CallSize) -> DenoiserCall:
    """Normal values in the shapes of a call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    image = normal(size.image, config["image_dim"]) if size.image else None
    return DenoiserCall(normal(*size.latent), torch.tensor([TIMESTEP]), normal(size.text, config["text_dim"]), image)
