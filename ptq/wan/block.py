"""Names inside a WanTransformer3DModel: the Linears of a block and the distinct inputs they read.

Ten Linears read seven inputs; where each block also reads image tokens (Wan 2.1 I2V), twelve read eight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ptq.errors import UsageError

BLOCKS = "blocks"
"""Name of the block list in the expert."""

READERS: dict[str, tuple[str, ...]] = {
    "attn1.in": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.out": ("attn1.to_out.0",),
    "attn2.q": ("attn2.to_q",),
    "attn2.context": ("attn2.to_k", "attn2.to_v"),
    "attn2.image": ("attn2.add_k_proj", "attn2.add_v_proj"),
    "attn2.out": ("attn2.to_out.0",),
    "ffn.in": ("ffn.net.0.proj",),
    "ffn.hidden": ("ffn.net.2",),
}
"""Distinct input of a block -> the Linears that read it, in the order in which a block computes them. "attn2.context" and
"attn2.image" are the same tokens for every block; the latter is only there where the model reads an image encoder's."""

Rows = Literal["video", "text", "image", "one"]
"""What the rows of an input are: tokens of the video, the text or the image encoder, or one row a call."""


@dataclass(frozen=True)
class BlockInput:
    """An input of a block: the Linears [n, k] that read it, and what its rows are."""

    linears: tuple[str, ...]
    n: int
    k: int
    rows: Rows = "video"


def block_prefix(index: int) -> str:
    """Prefix of a block's tensors in the expert's state dict."""
    return f"{BLOCKS}.{index}."


def width(config: Mapping[str, Any]) -> int:
    """Inner dimension of an expert, from its config.json."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def video_tokens(config: Mapping[str, Any], latent: Sequence[int]) -> int:
    """Tokens of a video whose latents are [C, T, H, W]."""
    return math.prod(size // side for size, side in zip(latent[1:], config["patch_size"], strict=True))


def check_size(height: int, width: int, num_frames: int, stride: int, period: int, patch: Sequence[int]) -> None:
    """Refuse a video that is not made of whole patches of latents.

    Args:
        stride, period: of the VAE, in space and time. patch: sides of a patch [T, H, W], from the expert's config.json.

    Raises:
        UsageError: names the nearest that the model can make.
    """
    for name, value, side in (("height", height, patch[1]), ("width", width, patch[2])):
        multiple = stride * side
        if value % multiple:
            nearest = max(round(value / multiple), 1) * multiple
            raise UsageError(f"{name} must be a multiple of {multiple} for this model, found {value}; try {nearest}.")
    if num_frames % period != 1:
        raise UsageError(
            f"The number of frames must be {period} n + 1 for this model, found {num_frames}; try {num_frames // period * period + 1}."
        )


def block_inputs(config: Mapping[str, Any]) -> dict[str, BlockInput]:
    """Distinct input of a block -> who reads it, from the expert's config.json."""
    d, ffn, image = width(config), int(config["ffn_dim"]), config.get("added_kv_proj_dim")
    outputs, channels = {"ffn.in": ffn}, {"ffn.hidden": ffn, "attn2.image": image}
    rows: dict[str, Rows] = {"attn2.context": "text", "attn2.image": "image"}
    return {
        name: BlockInput(linears, outputs.get(name, d), int(channels.get(name) or d), rows.get(name, "video"))
        for name, linears in READERS.items()
        if name != "attn2.image" or image is not None
    }


def rows_outside(name: str) -> Rows:
    """What the rows are that a Linear outside the blocks reads."""
    if "text_embedder" in name:
        return "text"
    if "image_embedder" in name:
        return "image"
    return "one" if "time" in name else "video"
