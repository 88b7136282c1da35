"""What every 4-bit block format offers: the `Format` interface, its `Codes`, the table of formats.

A format cuts the last dimension K into groups, gives each group a scale and each element a nibble. Two views of the
same codes exist: (elements, scales) for arithmetic, and (weight_packed, weight_scale) as stored in a checkpoint.
Rounding solvers use the third view, `steps` and `encode`: once scales are fixed, every element has its own step and the
format is a plain nearest-level quantizer on `x / step`.

Tensors in CPU memory are converted by compiled kernels (`ptq.scheme.native`) where a format has them, all others by the
eager functions of the formats, which are the definition: both give the same codes. Eager functions work on columns,
[group, n] with n groups side by side, so that every operation runs along contiguous memory.

Deliberately no nn.Module and no state: functions of tensors on whatever device they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptq import known
from ptq.errors import FormatError
from ptq.scheme import native
from ptq.scheme.placement import DECODED, Placement, place_rows
from ptq.scheme.tensors import into, pack_nibbles, to_columns, unpack_nibbles

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN_SCALE = 0xFF
"""Lowest byte of the scale of a group that holds a NaN or an infinity."""
EMPTY = 1 << 12
"""An exponent beyond every real one: that of a group of zeros."""


@dataclass(frozen=True)
class Codes:
    """Unpacked codes of one tensor.

    Attributes:
        elements: uint8 [..., K], one nibble a byte: sign << 3 | magnitude.
        scales: [..., K / group_size] in the format's `scale_dtype`, as stored in `weight_scale`.
    """

    elements: Tensor
    scales: Tensor


class Format(ABC):
    """A 4-bit block format along the last dimension. Stateless; get one with `get_format(name)`.

    A format of your own subclasses this, sets the names below, defines the abstract methods, and is made known with
    `register_format`. Everything else has a default: no compiled twin, no search of scales, no Triton kernels, products in
    bfloat16.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """The name as people write it."""
    description: ClassVar[str]
    """Sentences for the report: groups, scales, elements, bits a value."""
    group_size: ClassVar[int]
    bits_per_value: ClassVar[float]
    scale_dtype: ClassVar[torch.dtype]
    """An integer dtype: the diffusers loader casts floating ones."""
    scale_layout: ClassVar[str]
    scale_rules: ClassVar[tuple[str, ...]]
    """Names accepted by `scale_rule`; the first one is the default."""
    ties_options: ClassVar[tuple[str, ...]]
    """Names accepted by `ties`; the first one is the default of every rule that `usual_ties` does not name."""
    searched_scales: ClassVar[str | None] = None
    """What `search_scales` tries, for the report; None: there is no search."""
    search_elements: ClassVar[int] = 1 << 18
    """Of a weight that `search_scales` gets at a time on a CPU: temporaries of eager functions stay in the cache."""
    kernel_id: ClassVar[int | None] = None
    """What `ptq.runtime.kernels.formats` knows the format by; None: it runs on the CPU only."""
    block_scaled: ClassVar[bool] = False
    """Whether packed codes and scales are MXFP4's: operands of Blackwell's block-scaled tensor cores as they are."""

    # Public, shape-checked entry points.

    def quantize(self, x: Tensor, *, scale_rule: str | None = None, ties: str | None = None) -> Codes:
        """Quantize along the last dimension.

        Args:
            x: float32, bfloat16 or float16 [..., K], K a multiple of `group_size`. Arithmetic is float32.
            scale_rule: one of `scale_rules` (default: the first).
            ties: one of `ties_options` (default: `usual_ties` of the rule).

        Returns:
            Codes. A group that holds a NaN or an infinity becomes a NaN group (scale byte 0xFF, elements 0).

        Raises:
            FormatError: dtype, K, scale rule or ties not accepted.
        """
        rule, ties = self.check(x, scale_rule, ties)
        kernels = self._compiled(x, rule, ties)
        if kernels is not None:
            return Codes(*native.codes(kernels, x, self.group_size, self.scale_dtype, packed=False))
        elements, scales = self.quantize_columns(to_columns(x, self.group_size), rule, ties)
        elements = elements.T.contiguous().view(x.shape)
        return Codes(elements, scales.view(*x.shape[:-1], x.shape[-1] // self.group_size))

    def quantize_and_pack(
        self, x: Tensor, *, scale_rule: str | None = None, ties: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """`pack(quantize(x))`, on a CPU without unpacked codes in between. Same arguments and errors as `quantize`.

        Returns:
            weight_packed uint8 [..., K/2], weight_scale [..., K/group_size].
        """
        rule, ties = self.check(x, scale_rule, ties)
        kernels = self._compiled(x, rule, ties)
        if kernels is not None:
            return native.codes(kernels, x, self.group_size, self.scale_dtype, packed=True)
        return self.pack(self.quantize(x, scale_rule=rule, ties=ties))

    def dequantize(self, codes: Codes) -> Tensor:
        """Exact values of the codes as float32 [..., K]; NaN groups decode to NaN."""
        self._check_codes(codes)
        kernels = self._decoding(codes.elements)
        if kernels is not None:
            return native.decoded(kernels, codes.elements, codes.scales, self.group_size, packed=False)
        return self.decode(codes.elements, self.steps(codes.scales))

    def fake_quantize(self, x: Tensor, *, scale_rule: str | None = None, ties: str | None = None) -> Tensor:
        """`dequantize(quantize(x))` without building codes, in the dtype of `x`.

        Exact in float32 and bfloat16. float16 cannot hold every value of the formats: they are rounded to it, and
        saturate at 65504 instead of becoming infinite. Same arguments and errors as `quantize`; NaN groups are NaN.
        """
        rule, ties = self.check(x, scale_rule, ties)
        kernels = self._compiled(x, rule, ties)
        if kernels is not None:
            wide = x.float() if x.dtype == torch.float16 else x
            return into(x.dtype, native.values(kernels, wide, self.group_size))
        values = self.fake_quantize_columns(to_columns(x, self.group_size), rule, ties)
        return into(x.dtype, values).T.contiguous().view(x.shape)

    def fake_quantize_(self, x: Tensor, *, scale_rule: str | None = None) -> Tensor:
        """`fake_quantize` of a float32 tensor that nobody else holds: a compiled kernel writes into it."""
        rule, ties = self.check(x, scale_rule, None)
        kernels = self._compiled(x, rule, ties)
        if kernels is None:
            return self.fake_quantize(x, scale_rule=rule)
        return native.values(kernels, x, self.group_size, in_place=True)

    def pack(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Codes -> (weight_packed uint8 [..., K/2] even k in the low nibble, weight_scale [..., K/group_size])."""
        self._check_codes(codes)
        return pack_nibbles(codes.elements), codes.scales

    def unpack(self, weight_packed: Tensor, weight_scale: Tensor) -> Codes:
        """Inverse of `pack`.

        Raises:
            FormatError: dtypes or shapes that do not belong together.
        """
        self._check_packed(weight_packed, weight_scale)
        return Codes(unpack_nibbles(weight_packed), weight_scale)

    # The format itself, on float32 tensors of checked shape.

    @abstractmethod
    def steps(self, scales: Tensor) -> Tensor:
        """Scales [..., K/g] -> the factor of each element as float32 [..., K]; NaN for NaN groups."""

    @abstractmethod
    def levels(self, elements: Tensor) -> Tensor:
        """Elements uint8 -> signed level as float32, such that value = level * step."""

    @abstractmethod
    def encode(self, x: Tensor, steps: Tensor) -> Tensor:
        """Nearest element for given steps: float32 x and steps (broadcastable) -> uint8 elements, never -0."""

    def decode(self, elements: Tensor, steps: Tensor) -> Tensor:
        """Elements and steps -> float32 values."""
        return self.levels(elements) * steps

    @abstractmethod
    def quantize_columns(self, x_gn: Tensor, rule: str, ties: str) -> tuple[Tensor, Tensor]:
        """float32 [group, n] -> (elements uint8 [group, n], scales [n])."""

    # What a format may add.

    def fake_quantize_columns(self, x_gn: Tensor, rule: str, ties: str) -> Tensor:
        """float32 [group, n] -> its values on the grid, float32 [group, n]."""
        elements, scales = self.quantize_columns(x_gn, rule, ties)
        return self.decode(elements.T, self.steps(scales.unsqueeze(-1))).T

    def kernels(self, rule: str, ties: str) -> native.Kernels | None:
        """The compiled kernels of the format with these options; None: the eager functions run on the CPU too."""
        return None

    def kernel_rule(self, scale_rule: str) -> int:
        """The number by which the format's device functions know a scale rule."""
        return self.scale_rules.index(scale_rule)

    def usual_ties(self, scale_rule: str) -> str:
        """How a rule rounds ties where nothing else is asked for, and how layers round them."""
        return self.ties_options[0]

    def searched(self, scale_rule: str | None) -> str | None:
        """`searched_scales` where the weight has this rule."""
        return self.searched_scales

    def search_scales(self, w_rk: Tensor, weights_k: Tensor | None, scale_rule: str | None = None) -> Tensor:
        """Scales [R, K / group] of a weight float32 [R, K] with the smallest squared error, columns weighted by float32 [K].

        scale_rule: of the weight; where a rule has scales of a kind of its own, they are searched among these.

        Raises:
            FormatError: the format has no such search.
        """
        raise FormatError(f"{self.title} has no search of weight scales: set solver.clip_search to false.")

    def exact_in_fp8(self, scale_rule: str | None) -> bool:
        """Whether inputs quantized by this rule are exact in FP8 times one power of two."""
        return False

    def exponents(self, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor] | None:
        """The d (`ptq.scheme.placement`) that the smallest and the largest values of each group of packed codes need.

        int32 [..., K / group] each, EMPTY and -EMPTY for groups of zeros and NaN groups. low is high + 1 where the smallest
        needs less than E2M1 * 2^high. None: values of these codes are not exact in FP8.
        """
        return None

    def place(self, weight_packed: Tensor, weight_scale: Tensor) -> Placement:
        """How a packed weight is held while it is multiplied: in FP8 where it is exact there, else in bfloat16.

        Raises:
            FormatError: a damaged weight.
        """
        exponents = self.exponents(weight_packed, weight_scale)
        if exponents is None:
            return DECODED
        if bool(((weight_scale & 0xFF) == NAN_SCALE).any()):
            raise FormatError("A weight scale is NaN (byte 0xFF): the checkpoint is damaged, quantize the model again.")
        low, high = exponents[0].amin(-1), exponents[1].amax(-1)
        return place_rows(torch.where(high == -EMPTY, low, torch.minimum(low, high)), high)

    def decode_packed(self, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
        """Packed codes -> exact values, float32 [..., K]. Errors of `unpack`."""
        kernels = self._decoding(weight_packed)
        if kernels is None:
            return self.dequantize(self.unpack(weight_packed, weight_scale))
        self._check_packed(weight_packed, weight_scale)
        return native.decoded(kernels, weight_packed, weight_scale, self.group_size, packed=True)

    def packed_tensors(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What a layer of N x K stores of its weight: name -> (shape, dtype)."""
        return {
            "weight_packed": ((n, k // 2), torch.uint8),
            "weight_scale": ((n, k // self.group_size), self.scale_dtype),
        }

    def __reduce__(self) -> tuple[Callable[[str], Format], tuple[str]]:
        return get_format, (self.name,)  # copies and other processes get the one that is registered

    # Checks.

    def _compiled(self, x: Tensor, rule: str, ties: str) -> native.Kernels | None:
        return self.kernels(rule, ties) if native.takes(x) else None

    def _decoding(self, elements: Tensor) -> native.Kernels | None:
        return self._compiled(elements, *self.options(None))

    def check(self, x: Tensor, scale_rule: str | None, ties: str | None) -> tuple[str, str]:
        """Check an input and its options.

        Returns:
            (scale rule, ties), defaults filled in.

        Raises:
            FormatError: dtype, K, scale rule or ties not accepted.
        """
        self._check_input(x)
        return self.options(scale_rule, ties)

    def options(self, scale_rule: str | None, ties: str | None = None) -> tuple[str, str]:
        """(scale rule, ties), defaults filled in; FormatError where the format does not have one."""
        rule = scale_rule or self.scale_rules[0]
        known.check_rule(self.name, self.scale_rules, rule)
        ties = ties or self.usual_ties(rule)
        if ties not in self.ties_options:
            raise FormatError(f"{self.name} has no ties option {ties!r}; choose one of {', '.join(self.ties_options)}.")
        return rule, ties

    def _check_input(self, x: Tensor) -> None:
        if x.dtype not in INPUT_DTYPES:
            raise FormatError(f"{self.name} takes float32, bfloat16 or float16, found {x.dtype}.")
        if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % self.group_size:
            raise FormatError(
                f"{self.name} quantizes groups of {self.group_size} along the last dimension, found shape {list(x.shape)}. Leave this layer out of the targets, or pad K to a multiple of {self.group_size}."
            )

    def _check_codes(self, codes: Codes) -> None:
        self._check_parts("elements", codes.elements, codes.elements.shape[-1], codes.scales)

    def _check_packed(self, weight_packed: Tensor, weight_scale: Tensor) -> None:
        self._check_parts("weight_packed", weight_packed, 2 * weight_packed.shape[-1], weight_scale)

    def _check_parts(self, name: str, elements: Tensor, k: int, scales: Tensor) -> None:
        expected = (*elements.shape[:-1], k // self.group_size)
        if (
            elements.dtype != torch.uint8
            or scales.dtype != self.scale_dtype
            or k % self.group_size
            or tuple(scales.shape) != expected
        ):
            raise FormatError(
                f"{self.name}: {name} {list(elements.shape)} {elements.dtype} must be uint8 with scales {list(expected)} {self.scale_dtype}, found scales {list(scales.shape)} {scales.dtype}."
            )


FORMATS: dict[str, Format] = {}
"""Name -> format, in the order in which they were registered."""


def check_name(name: str) -> None:
    """Raise FormatError where a name is empty or holds blanks: names are words in `Scheme.key` and on command lines."""
    if name.split() != [name]:
        raise FormatError(f"A name is one word without blanks, found {name!r}.")


def register_format(fmt: Format) -> None:
    """Make a format known by its name: recipes, checkpoints and the command line then take it.

    Raises:
        FormatError: another format has this name.
    """
    for name in (fmt.name, *fmt.scale_rules):
        check_name(name)
    if FORMATS.setdefault(fmt.name, fmt) is not fmt:
        raise FormatError(f"There is a format {fmt.name!r} already; give this one another name.")
    facts = known.KnownFormat(fmt.title, fmt.group_size, fmt.scale_rules, fmt.searched_scales)
    known.FORMATS.setdefault(fmt.name, facts)


def get_format(name: str) -> Format:
    """The format registered as `name`.

    Raises:
        FormatError: no such format.
    """
    if name not in FORMATS:
        raise known.unknown("format", name, FORMATS)
    return FORMATS[name]
