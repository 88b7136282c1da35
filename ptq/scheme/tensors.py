"""What formats do with tensors: groups and columns of them, signs of elements, pairs of nibbles in a byte."""

from __future__ import annotations

import torch
from torch import Tensor

FP16_MAX = 65504.0
"""Largest finite float16."""


def grouped(x: Tensor, size: int) -> Tensor:
    """[..., K] -> [..., K/size, size] (a view where `x` is contiguous)."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def with_sign(magnitude: Tensor, x: Tensor) -> Tensor:
    """uint8 magnitude index 0..7 and the signed source -> nibble; a zero magnitude never carries a sign."""
    negative = (x < 0) & (magnitude > 0)
    return magnitude | (negative.to(torch.uint8) << 3)


def to_columns(x: Tensor, group: int) -> Tensor:
    """[..., K] of any float dtype -> contiguous float32 [group, n], n groups."""
    return x.detach().reshape(-1, group).T.float().contiguous()


def into(dtype: torch.dtype, values: Tensor) -> Tensor:
    """float32 values, or values that are in `dtype` already, in that dtype; in float16 they saturate, so that no finite
    group comes back infinite."""
    if dtype == torch.float16:
        values = values.clamp(-FP16_MAX, FP16_MAX)
    return values.to(dtype)


def pack_nibbles(elements: Tensor) -> Tensor:
    """uint8 [..., K] nibbles -> uint8 [..., K/2], even k in the low nibble."""
    # Two nibbles read as one little-endian 16-bit word: much faster than strided access to every second byte.
    words = elements.contiguous().view(torch.int16)
    return (words | (words >> 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> uint8 [..., K] nibbles, inverse of `pack_nibbles`."""
    words = packed.to(torch.int16)
    return ((words | (words << 4)) & 0x0F0F).view(torch.uint8)
