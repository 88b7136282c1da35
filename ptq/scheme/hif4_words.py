"""HiF4's scale words: one E6M2 byte and the micro-exponents of a group in 32 bits (PTO-ISA; see `ptq.scheme.hif4`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.scheme.format import NAN_SCALE

SCALE_BIAS = 48
BINADE = 4
"""Bytes from one S to twice that S."""


def split_words(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale words int32 [..., G] -> (S float32 [..., G], e8 int32 [..., G, 8], e16 int32 [..., G, 16])."""
    e8 = (words.unsqueeze(-1) >> torch.arange(8, 16, device=words.device)) & 1
    e16 = (words.unsqueeze(-1) >> torch.arange(16, 32, device=words.device)) & 1
    return scale_values(words & 0xFF), e8.to(torch.int32), e16.to(torch.int32)


def join_words(byte: Tensor, e8: Tensor, e16: Tensor) -> Tensor:
    """E6M2 bytes [..., G] and exponent bits [..., G, 8], [..., G, 16] -> scale words int32 [..., G]."""
    low = (e8.to(torch.int32) << torch.arange(8, 16, device=byte.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    # Bit 31 is the sign of int32; the sum wraps, which is the wanted bit pattern.
    high = (e16.to(torch.int32) << torch.arange(16, 32, device=byte.device, dtype=torch.int32)).sum(
        -1, dtype=torch.int32
    )
    return byte.to(torch.int32) | low | high


def scale_values(byte: Tensor) -> Tensor:
    """E6M2 bytes (any integer dtype) -> float32 S; 0xFF is NaN."""
    byte = byte.to(torch.int32)
    bits = ((byte >> 2) - SCALE_BIAS + 127 << 23) | ((byte & 3) << 21)
    return torch.where(byte == NAN_SCALE, torch.nan, bits.view(torch.float32))
