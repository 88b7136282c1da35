"""How a layer is quantized, as one value: what a recipe says, a quantized layer holds and config.json stores.

`to_config` and `from_config` are the only translation between the value and the JSON object; `key` and `from_key` are the
same for the one string that an operator can carry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ptq.errors import FormatError, PtqError
from ptq.scheme import native
from ptq.scheme.format import Format, get_format
from ptq.scheme.hadamard import Hadamard
from ptq.scheme.residual import columns
from ptq.scheme.smoothing import Smoothed
from ptq.scheme.transform import UNCHANGED, Transform, get_transform


@dataclass(frozen=True)
class Scheme:
    """The numerics of one quantized Linear.

    Attributes:
        format: of weight and input alike.
        transform: the basis in which both are quantized.
        input_rule: scale rule of the dynamic quantization of inputs; None: the format's default, filled in.

    Raises:
        FormatError: blocks that do not fit the format, a rule that the format does not have.
    """

    format: Format
    transform: Transform = UNCHANGED
    input_rule: str | None = None

    def __post_init__(self) -> None:
        self.transform.check(self.format.group_size)
        object.__setattr__(self, "input_rule", self.format.options(self.input_rule)[0])

    @classmethod
    def of(
        cls, format_name: str, *, transform: str = UNCHANGED.kind, block: int = 0, input_rule: str | None = None
    ) -> Scheme:
        """By names, as a recipe's `scheme` says it: `Scheme.of("hif4", transform="learned", block=64, input_rule="mse")`.

        Raises:
            FormatError: unknown names, or names that do not fit together.
        """
        return cls(get_format(format_name), get_transform(transform, block), input_rule)

    # What a layer of this scheme is made of.

    @property
    def multiple(self) -> int:
        """K must be a multiple of this: whole groups and whole blocks."""
        return math.lcm(self.format.group_size, self.transform.multiple)

    def unit(self, k: int) -> int:
        """Channels of an input with K that are quantized by themselves: whole groups and whole blocks."""
        return math.lcm(self.format.group_size, self.transform.block_of(k) or 1)

    def check_width(self, k: int) -> None:
        """Raise FormatError where K input channels cannot be quantized so."""
        if k % self.multiple:
            raise FormatError(
                f"K = {k} is not a multiple of {self.multiple} ({self.format.name} groups of {self.format.group_size}, transform {self.transform.kind} in blocks of a multiple of {self.transform.multiple}). Leave the layer out of the targets, or choose another scheme.block."
            )

    def tensors(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What a layer of N x K stores besides its bias: name -> (shape, dtype)."""
        tensors = self.format.packed_tensors(n, k)
        basis = self.transform.stored(k)
        return tensors if basis is None or self.transform.tensor is None else tensors | {self.transform.tensor: basis}

    def basis_bytes(self, k: int) -> int:
        """Bytes of the basis of a layer with K input channels."""
        stored = self.transform.stored(k)
        return 0 if stored is None else torch.Size(stored[0]).numel() * stored[1].itemsize

    # What it computes.

    def transform_input(self, x: Tensor, basis: Tensor | None) -> Tensor:
        """Input [..., K] of any float dtype -> float32, in the basis in which it is quantized."""
        return self.transform.input(x.float(), basis)

    def quantize_input(self, x: Tensor, basis: Tensor | None, residual: Sequence[int] = ()) -> Tensor:
        """Input [..., K] of any float dtype -> float32 values on the format's grid: change of basis, then quantize.

        residual: R blocks whose quantized residual stands behind them, [..., K + 64 R] (`ptq.scheme.residual`).
        """
        fmt, rule = self.format, self.input_rule
        if basis is not None and not residual and self.transform.kernel == "blocks" and native.takes(x):
            values = _compiled(fmt, str(rule))(x, basis)
            if values is not None:
                return values
        changed = self.transform_input(x, basis)
        rest = columns(changed, residual) if residual else None  # a copy: values may take the place of what they are of
        values = (fmt.fake_quantize_ if self.transform.makes_tensor else fmt.fake_quantize)(changed, scale_rule=rule)
        if rest is None:
            return values
        return torch.cat((values, fmt.fake_quantize_(rest - columns(values, residual), scale_rule=rule)), -1)

    # Other forms.

    def describe(self) -> str:
        """For people: "HiF4, transform learned in blocks of at most 128, inputs by the rule mse"."""
        blocks = f" in blocks of at most {self.transform.block}" if self.transform.block else ""
        return f"{self.format.title}, transform {self.transform.kind}{blocks}, inputs by the rule {self.input_rule}"

    @property
    def key(self) -> str:
        """The scheme as one string, "mxfp4 learned 64 even"."""
        return f"{self.format.name} {self.transform.kind} {self.transform.block} {self.input_rule}"

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_key(key: str) -> Scheme:
        """The inverse of `key`."""
        format_name, kind, block, rule = key.split(" ")
        return Scheme(get_format(format_name), get_transform(kind, int(block)), rule)

    def to_config(self) -> dict[str, Any]:
        """The scheme's part of `quantization_config` in config.json."""
        fmt, transform = self.format, self.transform
        smoothed = transform.kind == Smoothed.kind
        plain = Hadamard.kind if transform.block else UNCHANGED.kind
        return {
            "format": fmt.name,
            "weights": _Weights(group_size=fmt.group_size, scale_layout=fmt.scale_layout).model_dump(),
            "input_activations": _Inputs(
                format=fmt.name, scale_rule=str(self.input_rule), ties=fmt.usual_ties(str(self.input_rule))
            ).model_dump(),
            "transform": _Transform(
                type=plain if smoothed else transform.kind, block_size=transform.block, smooth=smoothed
            ).model_dump(),
        }

    @classmethod
    def from_config(cls, value: Mapping[str, Any], where: str) -> Scheme:
        """Read what `to_config` wrote.

        Args:
            where: the file, for messages.

        Raises:
            PtqError: unknown keys or values, or a combination that this version cannot run; the text names them.
        """
        try:
            config = _Config.model_validate(value)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise PtqError(f"{where} has a quantization_config that this version cannot read: {problems}.") from error
        try:
            return config.scheme(where)
        except FormatError as error:
            raise PtqError(f"{where}: {error}") from error


@functools.lru_cache(maxsize=64)
def _compiled(fmt: Format, rule: str) -> Callable[[Tensor, Tensor], Tensor | None]:
    """(x, decoded blocks) -> `native_input.quantized`; None where the format has no compiled kernels."""
    kernels = fmt.kernels(rule, fmt.usual_ties(rule))
    if kernels is None:
        return lambda x, blocks: None
    from ptq.scheme import native_input

    return functools.partial(native_input.quantized, kernels=kernels, group=fmt.group_size)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Weights(_Strict):
    group_size: int
    nibble_order: Literal["low_first"] = "low_first"
    scale_layout: str


class _Inputs(_Strict):
    format: str
    dynamic: Literal[True] = True
    scale_rule: str
    ties: str


class _Transform(_Strict):
    """Smoothing is a flag beside a Hadamard rotation, or beside none; every other transform is its kind."""

    type: str
    block_size: int = Field(ge=0)
    smooth: bool


class _Config(_Strict):
    format: str
    weights: _Weights
    input_activations: _Inputs
    transform: _Transform

    def scheme(self, where: str) -> Scheme:
        fmt, inputs, transform = get_format(self.format), self.input_activations, self.transform
        if (self.weights.group_size, self.weights.scale_layout) != (fmt.group_size, fmt.scale_layout):
            raise PtqError(
                f"{where} declares {fmt.name} weights with group size {self.weights.group_size} and layout {self.weights.scale_layout}; {fmt.name} has {fmt.group_size} and {fmt.scale_layout}."
            )
        problems = []
        if inputs.format != fmt.name:
            problems.append(f"inputs in {inputs.format} with weights in {fmt.name}")
        if inputs.scale_rule not in fmt.scale_rules:
            problems.append(f"the scale rule {inputs.scale_rule!r}")
        if inputs.ties not in fmt.ties_options:
            problems.append(f"the ties option {inputs.ties!r}")
        elif inputs.ties != fmt.usual_ties(inputs.scale_rule):
            raise PtqError(
                f"{where} asks for inputs whose ties are rounded {inputs.ties}; layers of this version round them {fmt.usual_ties(inputs.scale_rule)}. Quantize the model again, or run the checkpoint with the version that made it."
            )
        if transform.smooth and transform.type not in (UNCHANGED.kind, Hadamard.kind):
            problems.append(f"a transform of type {transform.type} with a smoothing vector beside it")
        elif (transform.type, transform.block_size > 0) in ((UNCHANGED.kind, True), (Hadamard.kind, False)):
            problems.append(f"a transform of type {transform.type} with block size {transform.block_size}")
        elif transform.type == Smoothed.kind:
            problems.append(f"a transform of type {transform.type} (smoothing is a flag)")
        if problems:
            raise PtqError(f"{where} asks for {' and for '.join(problems)}, which this version cannot run.")
        kind = Smoothed.kind if transform.smooth else transform.type
        return Scheme(fmt, get_transform(kind, transform.block_size), inputs.scale_rule)
