"""HiF4 (HiFloat4, arXiv 2602.11287): three-level scales over groups of 64, 4.5 bits a value.

A group is 8 x 2 x 4 elements. Element i is sign * k/4 * 2^(e8[i//8] + e16[i//4]) * S with k in 0..7, one-bit exponents
e8 and e16, and an unsigned E6M2 scale S = 2^(E-48) * (1 + M/4). The scale word is one little-endian 32-bit word a group
(PTO-ISA): bits 7:0 the E6M2 byte, bit 8+i = e8[i], bit 16+i = e16[i].

The rule `reference` follows the organisers' conversion step by step (bfloat16 reciprocals included): its rounding of S and
its thresholds are part of the format as everyone measures it, so they are bit-identical here rather than mathematically
nicer. The rule `mse` starts from its S and searches S and the exponents for the smallest squared error. The rule `p2` takes
S without its mantissa, a power of two: values then have three significant bits and are exact in FP8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.known import FORMATS
from ptq.scheme import native
from ptq.scheme.format import EMPTY, NAN_SCALE, Format
from ptq.scheme.hif4_search import searched_words
from ptq.scheme.hif4_words import BINADE, SCALE_BIAS, join_words, scale_values, split_words
from ptq.scheme.tensors import grouped, with_sign

SCALE_MIN, SCALE_MAX = 2.0**-48, 49152.0
BF16_ONE_SEVENTH = 0.142578125
"""bfloat16(1/7)."""
MSE_BYTES = 3
"""The rule `mse` tries this many E6M2 bytes, from the reference's upwards. Lower ones were measured to add nothing."""
MSE_LARGEST = 128.0
"""`mse` counts magnitudes above 128 quarters of S's power of two as 128. No such value can be written, so that only an
error that no choice avoids becomes smaller, and squares stay finite."""
P2_MAX_EXPONENT = 15
"""2^15 is the largest S without a mantissa."""
KNOWN = FORMATS["hif4"]


class HiF4(Format):
    """The HiF4 format. See `Format` for the interface."""

    name = "hif4"
    title = KNOWN.title
    description = "HiF4 (HiFloat4, arXiv 2602.11287): groups of 64 values along the input dimension share one E6M2 scale; eight bits double single eighths of the group and sixteen bits single fours; each value has a sign and a level from 0 to 7. 4.5 bits a value."
    group_size = KNOWN.group_size
    bits_per_value = 4.5
    scale_dtype = torch.int32
    scale_layout = "hif4-pto-u32-v1"
    scale_rules = KNOWN.scale_rules
    ties_options = ("away", "even")
    searched_scales = KNOWN.searched_scales
    search_elements = 1 << 22  # the compiled search has no temporaries of a weight's size, and splits it over threads
    kernel_id = 1

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
        byte, _, e8, e16, level = _convert(x_gn, rule, ties)
        finite = byte != NAN_SCALE
        words = join_words(byte, (e8.reshape(8, -1) & finite).T, (e16.reshape(16, -1) & finite).T)
        return with_sign(level.reshape(x_gn.shape).to(torch.uint8), x_gn) * finite, words

    def fake_quantize_columns(self, x_gn: Tensor, rule: str, ties: str) -> Tensor:
        byte, scale, e8, e16, level = _convert(x_gn, rule, ties)
        quarter = torch.where(byte == NAN_SCALE, torch.nan, scale * 0.25) * (1.0 + e8.float()) * (1.0 + e16.float())
        return torch.copysign((level * quarter).reshape(x_gn.shape), x_gn) + 0.0

    def kernels(self, rule: str, ties: str) -> native.Kernels:
        from ptq.scheme.native_hif4 import codes, decode, values

        return native.Kernels(codes, values, decode, (self.kernel_rule(rule), ties == "even"))

    def usual_ties(self, scale_rule: str) -> str:
        return "even" if scale_rule == "p2" else self.ties_options[0]

    def searched(self, scale_rule: str | None) -> str | None:
        if scale_rule != "p2":
            return self.searched_scales
        return "powers of two from half to twice the rule's, micro-exponents free"

    def exact_in_fp8(self, scale_rule: str | None) -> bool:
        return scale_rule == "p2"

    def exponents(self, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor] | None:
        byte = scales & 0xFF
        finite = byte != NAN_SCALE
        if bool(((byte & 3 != 0) & finite).any()):
            return None
        _, e8, e16 = split_words(scales)
        # A four holds k * 2^j with k up to 7, of which 2^j is the lowest bit; that of E2M1 * 2^d is 2^(d - 1).
        j = ((byte >> 2) - SCALE_BIAS - 2).unsqueeze(-1) + e8.repeat_interleave(2, dim=-1) + e16
        used = ((packed.reshape(*j.shape, 2) & 0x77) != 0).any(-1) & finite.unsqueeze(-1)
        return torch.where(used, j + 1, EMPTY).amin(-1), torch.where(used, j, -EMPTY).amax(-1)

    def search_scales(self, w_rk: Tensor, weights_k: Tensor | None, scale_rule: str | None = None) -> Tensor:
        p2 = scale_rule == "p2"
        self._check_input(w_rk)
        amax = grouped(w_rk.abs(), self.group_size).amax(-1)
        byte = _power_of_two_bytes(amax)[0] if p2 else _scale_bytes(amax)
        return searched_words(w_rk, byte, weights_k, p2)


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


def _convert(x_gn: Tensor, rule: str, ties: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A conversion of float32 columns [64, n].

    Returns:
        E6M2 byte int32 [n], S float32 [n], e8 bool [8, 1, 1, n], e16 bool [8, 2, 1, n], level float32 [8, 2, 4, n], a
        whole number in 0..7 (meaningless where the group is not finite: byte 0xFF).
    """
    magnitude = x_gn.abs().view(8, 2, 4, -1)
    byte, r, e8, e16 = SCALES[rule](magnitude)
    factor = r * 4.0 * torch.where(e8, 0.5, 1.0) * torch.where(e16, 0.5, 1.0)
    scaled = magnitude * factor
    level = torch.round(scaled) if ties == "even" else torch.floor(scaled + 0.5)
    return byte, scale_values(_finite(byte)), e8, e16, level.clamp(max=7.0)


def _reference(magnitude: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference's scales of |x| [8, 2, 4, n]: byte, 1/S rounded to bfloat16, e8, e16; shapes as in `_convert`."""
    v16 = magnitude.amax(2, keepdim=True)
    v8 = v16.amax(1, keepdim=True)
    byte = _scale_bytes(v8.amax(0).flatten())
    r = _to_bf16(1.0 / scale_values(_finite(byte)))
    e8 = v8 * r >= 4.0
    half_e8 = torch.where(e8, 0.5, 1.0)  # 2^-e8
    return byte, r, e8, v16 * r * half_e8 >= 2.0


def _power_of_two_scales(magnitude: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scales of |x| [8, 2, 4, n] under `p2`: S = 2^(floor(log2 maximum) - 2), thresholds 4 S and, without e8, 2 S.

    Returns:
        Byte, 1/S (exact), e8, e16; shapes as in `_convert`.
    """
    v16 = magnitude.amax(2, keepdim=True)
    v8 = v16.amax(1, keepdim=True)
    amax = v8.amax(0).flatten()
    byte, exponent = _power_of_two_bytes(amax)
    s = _power_of_two(exponent)
    e8 = v8 >= 4.0 * s
    return byte, _power_of_two(-exponent), e8, v16 >= torch.where(e8, 4.0, 2.0) * s


def _power_of_two_bytes(amax: Tensor) -> tuple[Tensor, Tensor]:
    """Group maximum -> E6M2 byte under `p2`, 0xFF if not finite, and the exponent of its S."""
    exponent = ((amax.view(torch.int32) >> 23) - 129).clamp(-SCALE_BIAS, P2_MAX_EXPONENT)
    return torch.where(torch.isfinite(amax), (exponent + SCALE_BIAS) * BINADE, NAN_SCALE), exponent


def _search(magnitude: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scales with the smallest squared error among the reference's byte and those above it, e8 and e16 free.

    For given S and e8 each four elements choose e16 alone, and each eight choose e8 alone, so the optimum is exact. On
    equal error the lower byte and the smaller exponents win. Both sides of a tie have the same error, so the scales do not
    depend on how ties are rounded.

    Returns:
        Byte, 1/S rounded to float32, e8, e16; shapes as in `_convert`.
    """
    base = _scale_bytes(magnitude.amax((0, 1, 2)))
    chosen = first = _finite(base)
    exponent = (first >> 2) - SCALE_BIAS
    # In quarters of S's power of two: steps lie between 1 and 10, and their products with levels are exact.
    y = (magnitude * _power_of_two(2 - exponent)).clamp(max=MSE_LARGEST)
    best = torch.full_like(y[0, 0, 0], torch.inf)
    e8, e16 = (torch.zeros_like(part, dtype=torch.bool) for part in (y[:, 0, 0], y[:, :, 0]))
    for byte in (first + offset for offset in range(MSE_BYTES)):
        r, step = _reciprocals(byte) * _power_of_two(exponent), scale_values(byte) * _power_of_two(-exponent)
        error0, error1, error2 = (_squared_errors(y, r * 0.5**shift, step * 2.0**shift) for shift in range(3))
        low, high = torch.minimum(error0, error1), torch.minimum(error1, error2)  # of four elements, e8 = 0 and 1
        low, high = low[:, 0] + low[:, 1], high[:, 0] + high[:, 1]  # of eight
        raised = high < low
        error = _sum_pairs(torch.minimum(low, high))
        better = (error < best) & (byte < NAN_SCALE)
        best, chosen = torch.where(better, error, best), torch.where(better, byte, chosen)
        e8 = torch.where(better, raised, e8)
        e16 = torch.where(better, torch.where(raised.unsqueeze(1), error2 < error1, error1 < error0), e16)
    return torch.where(base == NAN_SCALE, base, chosen), _reciprocals(chosen), e8[:, None, None], e16[:, :, None]


SCALES = {"reference": _reference, "mse": _search, "p2": _power_of_two_scales}
"""Scale rule -> its scales of |x| [8, 2, 4, n]."""


def _squared_errors(y: Tensor, r: Tensor, step: Tensor) -> Tensor:
    """Squared error of each four elements, [8, 2, 4, n] -> [8, 2, n], under steps [n] with the rounded reciprocals r."""
    squares = (y * r).round_().clamp_(max=7.0).mul_(step).sub_(y).square_()
    return _sum_pairs(squares.movedim(2, 0))


def _sum_pairs(x: Tensor) -> Tensor:
    """Sum over the first dimension, a power of two, by adding neighbours: an order that depends on no device."""
    while len(x) > 1:
        x = x[0::2] + x[1::2]
    return x[0]


def _finite(byte: Tensor) -> Tensor:
    """E6M2 bytes with those of NaN groups replaced by 0."""
    return byte.masked_fill(byte == NAN_SCALE, 0)


def _reciprocals(byte: Tensor) -> Tensor:
    """1/S rounded to float32. No division: torch.compile's on a GPU is not always the nearest float32."""
    mantissa = byte & 3
    r = torch.where(mantissa == 1, 1 / 1.25, torch.where(mantissa == 2, 1 / 1.5, 1 / 1.75))
    return torch.where(mantissa == 0, 1.0, r) * _power_of_two(SCALE_BIAS - (byte >> 2))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32 for int32 exponents in -126..127."""
    return ((exponent + 127) << 23).view(torch.float32)
