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

from ptq.formats import native
from ptq.formats.base import Format, with_sign

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

    def quantize_columns(self, x_gn: Tensor, rule: str, ties: str) -> tuple[Tensor, Tensor]:
        byte, _, e8, e16, level = _convert(x_gn, ties)
        finite = byte != NAN_SCALE
        words = join_words(byte, (e8.reshape(8, -1) & finite).T, (e16.reshape(16, -1) & finite).T)
        return with_sign(level.reshape(x_gn.shape).to(torch.uint8), x_gn) * finite, words

    def fake_quantize_columns(self, x_gn: Tensor, rule: str, ties: str) -> Tensor:
        byte, scale, e8, e16, level = _convert(x_gn, ties)
        quarter = torch.where(byte == NAN_SCALE, torch.nan, scale * 0.25) * (1.0 + e8.float()) * (1.0 + e16.float())
        return torch.copysign((level * quarter).reshape(x_gn.shape), x_gn) + 0.0

    def kernels(self, rule: str, ties: str) -> native.Kernels:
        from ptq.formats.native_hif4 import codes, values

        return native.Kernels(codes, values, (ties == "even",))


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
    s = _to_bf16(amax * BF16_ONE_SEVENTH).clamp(SCALE_MIN, SCALE_MAX)
    bits = s.view(torch.int32)
    bits = bits + 0xFFFFF + ((bits >> 21) & 1)
    byte = (bits >> 21) - ((127 - SCALE_BIAS) << 2)
    return torch.where(torch.isfinite(amax), byte, NAN_SCALE)


def _to_bf16(x: Tensor) -> Tensor:
    """Finite float32 rounded to bfloat16 (nearest even), kept as float32.

    Not `.to(bfloat16).float()`: torch.compile removes that pair as redundant, and the codes would differ.
    """
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def _powers(e8: Tensor, e16: Tensor) -> Tensor:
    """2^(e8 + e16) of each four elements: e8 [..., 8] and e16 [..., 16] integers -> float32 [..., 16]."""
    return (1 << (e8.repeat_interleave(2, dim=-1) + e16)).float()


def _convert(x_gn: Tensor, ties: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reference conversion on float32 columns [64, n].

    Returns:
        E6M2 byte int32 [n], S float32 [n], e8 bool [8, 1, 1, n], e16 bool [8, 2, 1, n], level float32 [8, 2, 4, n], a
        whole number in 0..7 (meaningless where the group is not finite: byte 0xFF).
    """
    magnitude = x_gn.abs().view(8, 2, 4, -1)
    v16 = magnitude.amax(2, keepdim=True)
    v8 = v16.amax(1, keepdim=True)
    byte = _scale_bytes(v8.amax(0).flatten())
    scale = scale_values(byte.masked_fill(byte == NAN_SCALE, 0))
    r = _to_bf16(1.0 / scale)
    e8 = v8 * r >= 4.0
    half_e8 = torch.where(e8, 0.5, 1.0)  # 2^-e8
    e16 = v16 * r * half_e8 >= 2.0
    factor = r * 4.0 * half_e8 * torch.where(e16, 0.5, 1.0)
    scaled = magnitude * factor
    level = torch.round(scaled) if ties == "even" else torch.floor(scaled + 0.5)
    return byte, scale, e8, e16, level.clamp(max=7.0)
