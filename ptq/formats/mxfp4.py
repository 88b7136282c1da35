"""MXFP4 (OCP Microscaling Formats v1.0): E2M1 elements, one E8M0 scale a group of 32, 4.25 bits a value.

Element nibble: sign in bit 3, magnitude index in bits 2:0 over {0, 0.5, 1, 1.5, 2, 3, 4, 6}. Scale byte b: 2^(b - 127),
0xFF is NaN. Names, dtypes and shapes are those of compressed-tensors' mxfp4-pack-quantized.

Scale rules differ only in when the exponent of the group's maximum is raised by one, so each is an integer added to the
float32 bits before the exponent is read off. `mse` tries both and keeps the smaller squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.formats.base import Format, grouped, with_sign

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NAN_SCALE = 0xFF
E2M1_MAX_EXPONENT = 2  # 6 = 1.5 * 2^2
# The exponent grows by one when the fraction of amax = 1.f * 2^e reaches: floor never, ceil f > 0.5 (amax > 6 * 2^(e-2)),
# even f >= 0.75 (half an E2M1 ulp added), qmax7.25 f > 0.8125 (amax > 7.25 * 2^(e-2)).
EXPONENT_CARRY = {"floor": 0, "ceil": 0x3FFFFF, "even": 0x200000, "qmax7.25": 0x17FFFF}


class MXFP4(Format):
    """The OCP MXFP4 format. See `Format` for the interface."""

    name = "mxfp4"
    group_size = 32
    bits_per_value = 4.25
    scale_dtype = torch.uint8
    scale_layout = "e8m0-u8"
    scale_rules = ("floor", "ceil", "even", "qmax7.25", "mse")
    ties_options = ("even", "away")

    def steps(self, scales: Tensor) -> Tensor:
        return scale_values(scales).repeat_interleave(self.group_size, dim=-1)

    def levels(self, elements: Tensor) -> Tensor:
        table = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), device=elements.device)
        table[8] = 0.0  # the nibble 8 is never written, and decodes to +0
        return table[elements.int()]

    def encode(self, x: Tensor, steps: Tensor) -> Tensor:
        return with_sign(_magnitude_index((x / steps).abs(), "even"), x)

    def _quantize(self, x: Tensor, rule: str, ties: str) -> tuple[Tensor, Tensor]:
        groups = grouped(x, self.group_size)
        scales = self._scales(groups, rule, ties)
        normalized = groups * _reciprocal(scales).unsqueeze(-1)
        elements = with_sign(_magnitude_index(normalized.abs(), ties), normalized)
        elements = elements.masked_fill((scales == NAN_SCALE).unsqueeze(-1), 0)
        return elements.reshape(x.shape), scales

    def _fake_quantize(self, x: Tensor, rule: str, ties: str) -> Tensor:
        groups = grouped(x, self.group_size)
        scales = self._scales(groups, rule, ties)
        return _round_groups(groups, scales, ties).reshape(x.shape)

    def _scales(self, groups: Tensor, rule: str, ties: str) -> Tensor:
        amax = groups.abs().amax(dim=-1)
        floor = _scale_bytes(amax, EXPONENT_CARRY["floor" if rule == "mse" else rule])
        if rule != "mse":
            return floor
        raised = torch.where(floor == NAN_SCALE, floor, floor + 1)
        error_floor = (_round_groups(groups, floor, ties) - groups).square().sum(-1)
        error_raised = (_round_groups(groups, raised, ties) - groups).square().sum(-1)
        return torch.where(error_raised < error_floor, raised, floor)


def scale_values(scales: Tensor) -> Tensor:
    """E8M0 bytes -> float32 2^(b - 127); byte 0 is the subnormal 2^-127, byte 0xFF is NaN."""
    exponent = scales.to(torch.int32)
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)
    bits = torch.where(exponent == NAN_SCALE, 0x7FC00000, bits)
    return bits.view(torch.float32)


def _scale_bytes(amax: Tensor, carry: int) -> Tensor:
    """Group maximum -> E8M0 byte of 2^(floor(log2 amax) - 2), rounded up as `carry` says; 0xFF if not finite."""
    raised = (amax.contiguous().view(torch.int32) + carry) >> 23
    scale = (raised - E2M1_MAX_EXPONENT).clamp(min=0)
    return torch.where(torch.isfinite(amax), scale, NAN_SCALE).to(torch.uint8)


def _reciprocal(scales: Tensor) -> Tensor:
    """2^(127 - b), exact: scales of finite groups never exceed byte 253, so the result is a normal float32."""
    return ((254 - scales.to(torch.int32)).clamp(min=1) << 23).view(torch.float32)


def _round_groups(groups: Tensor, scales: Tensor, ties: str) -> Tensor:
    """Nearest representable values of `groups` [..., G, 32] under `scales` [..., G]."""
    level, binade = _round_magnitude((groups * _reciprocal(scales).unsqueeze(-1)).abs(), ties)
    magnitude = (level * binade * 0.5).clamp(max=6.0) * scale_values(scales).unsqueeze(-1)
    # + 0.0 turns the -0 of a rounded-away negative value into +0, as the codes have it.
    return torch.copysign(magnitude, groups) + 0.0


def _round_magnitude(y: Tensor, ties: str) -> tuple[Tensor, Tensor]:
    """Magnitudes -> (integer level, binade): the E2M1 value is level * binade / 2, with binade 1, 2, 4, ...

    Within a binade the step is binade / 2, and an even level is an even mantissa: rounding the level half to even is
    IEEE rounding to nearest even.
    """
    binade = (y.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32).clamp(1.0, 4.0)
    level = y / binade * 2.0
    return (torch.round(level) if ties == "even" else torch.floor(level + 0.5)), binade


def _magnitude_index(y: Tensor, ties: str) -> Tensor:
    """Magnitudes -> uint8 index into MAGNITUDES, saturating at 6."""
    level, binade = _round_magnitude(y.nan_to_num(0.0).clamp(max=8.0), ties)
    # binade 1, 2, 4 -> offset 0, 2, 4: the levels 2, 3, 4 of one binade continue the indices of the one before.
    offset = torch.where(binade > 1.0, torch.where(binade > 2.0, 4.0, 2.0), 0.0)
    return (level + offset).clamp(max=7.0).to(torch.uint8)
