"""HiF4 (HiFloat4, arXiv 2602.11287): three-level scales over groups of 64, 4.5 bits a value.

A group is 8 x 2 x 4 elements. Element i is sign * k/4 * 2^(e8[i//8] + e16[i//4]) * S with k in 0..7, one-bit exponents
e8 and e16, and an unsigned E6M2 scale S = 2^(E-48) * (1 + M/4). The scale word is one little-endian 32-bit word a group
(PTO-ISA): bits 7:0 the E6M2 byte, bit 8+i = e8[i], bit 16+i = e16[i].

The conversion follows the organisers' reference step by step (bfloat16 reciprocals included): its rounding of S and its
thresholds are part of the format as everyone measures it, so they are bit-identical here rather than mathematically nicer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.formats.base import Format, grouped, with_sign

NAN_SCALE = 0xFF
SCALE_MIN, SCALE_MAX = 2.0**-48, 49152.0
SCALE_BIAS = 48
BF16_ONE_SEVENTH = 0.142578125  # bfloat16(1/7)


class HiF4(Format):
    """The HiF4 format. See `Format` for the interface."""

    name = "hif4"
    group_size = 64
    bits_per_value = 4.5
    scale_dtype = torch.int32
    scale_layout = "hif4-pto-u32-v1"
    scale_rules = ("reference",)
    ties_options = ("away", "even")

    def steps(self, scales: Tensor) -> Tensor:
        scale, e8, e16 = split_words(scales)
        quarters = scale.unsqueeze(-1) * 0.25 * _powers(e8, e16)  # [..., G, 16]
        return quarters.flatten(-2).repeat_interleave(4, dim=-1)

    def levels(self, elements: Tensor) -> Tensor:
        magnitude = (elements & 7).float()
        return torch.where(elements >= 8, -magnitude, magnitude) + 0.0

    def encode(self, x: Tensor, steps: Tensor) -> Tensor:
        level = torch.floor((x / steps).abs().nan_to_num(0.0) + 0.5).clamp(max=7.0)
        return with_sign(level.to(torch.uint8), x)

    def _quantize(self, x: Tensor, rule: str, ties: str) -> tuple[Tensor, Tensor]:
        quads, byte, _, e8, e16, level = _convert(x, ties)
        finite = byte != NAN_SCALE
        elements = with_sign(level.to(torch.uint8), quads) * finite[..., None, None]
        words = join_words(byte, e8 * finite.unsqueeze(-1), e16 * finite.unsqueeze(-1))
        return elements.reshape(x.shape), words

    def _fake_quantize(self, x: Tensor, rule: str, ties: str) -> Tensor:
        quads, byte, scale, e8, e16, level = _convert(x, ties)
        quarter = torch.where(byte == NAN_SCALE, torch.nan, scale * 0.25).unsqueeze(-1) * _powers(e8, e16)
        return (torch.copysign(level * quarter.unsqueeze(-1), quads) + 0.0).reshape(x.shape)


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


def _scale_bytes(amax: Tensor) -> Tensor:
    """Group maximum -> E6M2 byte of bf16(amax/7) rounded to two mantissa bits, nearest even; 0xFF if not finite."""
    s = (amax * BF16_ONE_SEVENTH).to(torch.bfloat16).float().clamp(SCALE_MIN, SCALE_MAX)
    bits = s.view(torch.int32)
    bits = bits + 0xFFFFF + ((bits >> 21) & 1)
    byte = (bits >> 21) - ((127 - SCALE_BIAS) << 2)
    return torch.where(torch.isfinite(amax), byte, NAN_SCALE)


def _powers(e8: Tensor, e16: Tensor) -> Tensor:
    """2^(e8 + e16) of each four elements: e8 [..., 8] and e16 [..., 16] integers -> float32 [..., 16]."""
    return (1 << (e8.repeat_interleave(2, dim=-1) + e16)).float()


def _convert(x: Tensor, ties: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reference conversion on float32 [..., K].

    Returns:
        quads [..., G, 16, 4] (the input), E6M2 byte int32 [..., G], S float32 [..., G], e8 int32 [..., G, 8],
        e16 int32 [..., G, 16], level float32 [..., G, 16, 4] in 0..7.
    """
    quads = grouped(grouped(x, 64), 4)
    magnitude = quads.abs()
    v16 = magnitude.amax(-1)
    v8 = grouped(v16, 2).amax(-1)
    byte = _scale_bytes(v8.amax(-1))
    finite_byte = torch.where(byte == NAN_SCALE, 0, byte)
    scale = scale_values(finite_byte)
    r = (1.0 / scale).to(torch.bfloat16).float().unsqueeze(-1)
    e8 = (v8 * r >= 4.0).to(torch.int32)
    half_e8 = (1.0 - 0.5 * e8.float()).repeat_interleave(2, dim=-1)  # 2^-e8
    e16 = (v16 * r * half_e8 >= 2.0).to(torch.int32)
    factor = r * 4.0 * half_e8 * (1.0 - 0.5 * e16.float())
    scaled = magnitude.nan_to_num(0.0, posinf=0.0) * factor.unsqueeze(-1)
    level = torch.round(scaled) if ties == "even" else torch.floor(scaled + 0.5)
    return quads, byte, scale, e8, e16, level.clamp(max=7.0)
