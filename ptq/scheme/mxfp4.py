"""MXFP4 (OCP Microscaling Formats v1.0): E2M1 elements, one E8M0 scale a group of 32, 4.25 bits a value.

Element nibble: sign in bit 3, magnitude index in bits 2:0 over {0, 0.5, 1, 1.5, 2, 3, 4, 6}. Scale byte b: 2^(b - 127),
0xFF is NaN. Names, dtypes and shapes are those of compressed-tensors' mxfp4-pack-quantized.

Scale rules differ only in when the exponent of the group's maximum is raised by one, so each is an integer added to the
float32 bits before the exponent is read off. `mse` tries both and keeps the smaller squared error.

Rounding to E2M1 is integer arithmetic on the float32 bits: exact, and the same under torch.compile and in the compiled
kernels (`ptq.scheme.native_mxfp4`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.known import FORMATS
from ptq.scheme import native
from ptq.scheme.format import EMPTY, NAN_SCALE, Format
from ptq.scheme.tensors import grouped, with_sign

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX_EXPONENT = 2
"""6 = 1.5 * 2^2."""
MAX_SCALE = 252
"""2^125: the largest scale under which every element, up to 6, is a finite float32."""
EXPONENT_CARRY = {"floor": 0, "ceil": 0x3FFFFF, "even": 0x200000, "qmax7.25": 0x17FFFF}
"""The exponent grows by one when the fraction of amax = 1.f * 2^e reaches: floor never, ceil f > 0.5 (amax > 6 * 2^(e-2)),
even f >= 0.75 (half an E2M1 ulp added), qmax7.25 f > 0.8125 (amax > 7.25 * 2^(e-2))."""
SEARCHED_OFFSETS = (0, 1, -1)
"""Exponents tried for a weight's group, relative to the rule `floor`, best first: on equal error the first one wins."""
KNOWN = FORMATS["mxfp4"]


class MXFP4(Format):
    """The OCP MXFP4 format. See `Format` for the interface."""

    name = "mxfp4"
    title = KNOWN.title
    description = "MXFP4 (OCP Microscaling v1.0): groups of 32 values along the input dimension share one power-of-two scale; each value is one of 15 E2M1 numbers. 4.25 bits a value."
    group_size = KNOWN.group_size
    bits_per_value = 4.25
    scale_dtype = torch.uint8
    scale_layout = "e8m0-u8"
    scale_rules = KNOWN.scale_rules
    ties_options = ("even", "away")
    searched_scales = KNOWN.searched_scales
    kernel_id = 0
    block_scaled = True

    def steps(self, scales: Tensor) -> Tensor:
        return scale_values(scales).repeat_interleave(self.group_size, dim=-1)

    def levels(self, elements: Tensor) -> Tensor:
        table = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), device=elements.device)
        table[8] = 0.0  # the nibble 8 is never written, and decodes to +0
        return table[elements.int()]

    def encode(self, x: Tensor, steps: Tensor) -> Tensor:
        return with_sign(_index((x / steps).abs().nan_to_num(0.0).clamp(max=8.0), "even"), x)

    def quantize_columns(self, x_gn: Tensor, rule: str, ties: str) -> tuple[Tensor, Tensor]:
        magnitude = x_gn.abs()
        scales = _scales(magnitude, rule, ties)
        elements = with_sign(_index(magnitude * _reciprocal(scales), ties), x_gn)
        return elements * (scales != NAN_SCALE), scales.to(torch.uint8)

    def fake_quantize_columns(self, x_gn: Tensor, rule: str, ties: str) -> Tensor:
        magnitude = x_gn.abs()
        scales = _scales(magnitude, rule, ties)
        values = _round(magnitude * _reciprocal(scales), ties) * scale_values(scales)
        # + 0.0 turns the -0 of a rounded-away negative value into +0, as the codes have it.
        return torch.copysign(values, x_gn) + 0.0

    def kernels(self, rule: str, ties: str) -> native.Kernels:
        from ptq.scheme.native_mxfp4 import codes, decode, values

        return native.Kernels(codes, values, decode, (_carry(rule), rule == "mse", ties == "even"))

    def kernel_rule(self, scale_rule: str) -> int:
        return -1 if scale_rule == "mse" else EXPONENT_CARRY[scale_rule]

    def search_scales(self, w_rk: Tensor, weights_k: Tensor | None, scale_rule: str | None = None) -> Tensor:
        floor = self.quantize(w_rk, scale_rule="floor").scales.to(torch.int32)
        weights = None if weights_k is None else grouped(weights_k, self.group_size)
        best_scales, best_error = floor, torch.full(floor.shape, torch.inf, device=w_rk.device)
        for offset in SEARCHED_OFFSETS:
            scales = (floor + offset).clamp(min=0)
            steps = self.steps(scales.to(torch.uint8))
            error = grouped(self.decode(self.encode(w_rk, steps), steps).sub_(w_rk).square_(), self.group_size)
            if weights is not None:
                error *= weights
            error_g = error.sum(-1)
            better = error_g < best_error
            best_error = torch.where(better, error_g, best_error)
            best_scales = torch.where(better, scales, best_scales)
        return best_scales.to(torch.uint8)

    def exact_in_fp8(self, scale_rule: str | None) -> bool:
        return True

    def exponents(self, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        used = ((grouped(packed, self.group_size // 2) & 0x77) != 0).any(-1) & (scales != NAN_SCALE)
        exponent = scales.to(torch.int32) - 127
        return torch.where(used, exponent, EMPTY), torch.where(used, exponent, -EMPTY)


def scale_values(scales: Tensor) -> Tensor:
    """E8M0 bytes -> float32 2^(b - 127); byte 0 is the subnormal 2^-127, byte 0xFF is NaN."""
    exponent = scales.to(torch.int32)
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)
    bits = torch.where(exponent == NAN_SCALE, 0x7FC00000, bits)
    return bits.view(torch.float32)


def _scales(magnitude: Tensor, rule: str, ties: str) -> Tensor:
    """|x| [32, n] -> scale bytes int32 [n]; 0xFF where the group is not finite."""
    amax = magnitude.amax(0)
    scales = _scale_bytes(amax, _carry(rule))
    if rule != "mse":
        return scales
    # In units of the smaller scale, where squares neither overflow nor vanish. A NaN compares false.
    y = magnitude * _reciprocal(scales)
    error = _sum((_round(y, ties) - y).square())
    error_raised = _sum((_round(y * 0.5, ties) * 2.0 - y).square())
    raise_it = (error_raised < error) & (scales < MAX_SCALE)
    return scales + raise_it.to(torch.int32)


def _carry(rule: str) -> int:
    return EXPONENT_CARRY["floor" if rule == "mse" else rule]


def _sum(x_gn: Tensor) -> Tensor:
    """Sum over the group, [32, n] -> [n], by adding halves: an order that does not depend on device or library."""
    while len(x_gn) > 1:
        low, high = x_gn.chunk(2)
        x_gn = low + high
    return x_gn[0]


def _scale_bytes(amax: Tensor, carry: int) -> Tensor:
    """Group maximum -> E8M0 byte of 2^(floor(log2 amax) - 2), rounded up as `carry` says; 0xFF if not finite."""
    raised = (amax.view(torch.int32) + carry) >> 23
    return torch.where(torch.isfinite(amax), (raised - E2M1_MAX_EXPONENT).clamp(0, MAX_SCALE), NAN_SCALE)


def _reciprocal(scales: Tensor) -> Tensor:
    """2^(127 - b), exact: scales of finite groups never exceed byte 252, so the result is a normal float32."""
    return ((254 - scales).clamp(min=1) << 23).view(torch.float32)


def _mantissa_rounded(y: Tensor, ties: str) -> Tensor:
    """float32 bits of y rounded to one mantissa bit, shifted so that this bit is bit 0: right for y >= 1."""
    bits = y.view(torch.int32)
    return (bits + (0x1FFFFF + ((bits >> 22) & 1) if ties == "even" else 0x200000)) >> 22


def _halves(y: Tensor, ties: str) -> Tensor:
    """y < 1 in halves: 0, 1 or 2 as float32."""
    if ties == "even":
        return torch.round(y * 2.0)
    return (y >= 0.25).float() + (y >= 0.75).float()


def _index(y: Tensor, ties: str) -> Tensor:
    """Magnitudes in units of the scale -> uint8 index into MAGNITUDES, saturating at 6."""
    # For y >= 1 exponent and mantissa bit count up through the indices; 1.0 is 127 << 1 and has index 2.
    large = (_mantissa_rounded(y, ties) - 252).clamp(0, 7)
    return torch.where(y < 1.0, _halves(y, ties).to(torch.int32), large).to(torch.uint8)


def _round(y: Tensor, ties: str) -> Tensor:
    """Magnitudes in units of the scale -> nearest of MAGNITUDES as float32; NaN stays NaN."""
    large = (_mantissa_rounded(y, ties) << 22).view(torch.float32).clamp(max=6.0)
    return torch.where(y < 1.0, _halves(y, ties) * 0.5, large)
