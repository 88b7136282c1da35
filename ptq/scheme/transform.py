"""The change of basis in which a layer is quantized: one class a kind, found by name.

Weight and input are quantized in another basis than the layer's own; the layer's output stays the same. What a change of
basis stores besides its rule is one tensor a layer, called `basis` wherever layers run. Online order: change of basis, then
quantize.

A transform of your own subclasses `Transform`, overrides what it does differently, and is made known with
`register_transform`. How a basis is chosen from statistics stands beside how it is applied; which of the candidates is kept
is measured by the solvers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from ptq import known
from ptq.errors import FormatError
from ptq.scheme.format import check_name

OFF = "off"
"""Name of the candidate that nothing was chosen for."""
NEGLIGIBLE = 1e-4
"""Share of a Hessian's mean diagonal below which a negative entry is rounding, not an error."""

Kernel = Literal["hadamard", "blocks"]
"""How the GPU quantizer changes the basis: a vector of factors and a block Hadamard (either may be absent), or stored blocks."""


@dataclass(frozen=True)
class Transform:
    """What every change of basis offers; as it stands, it changes nothing. All tensors along the last dimension K.

    Attributes:
        block: size of the blocks that are mixed (`block_of`: of a given K), 0 where channels stay apart.
    """

    kind: ClassVar[str]
    """Name in recipes and in config.json."""
    title: ClassVar[str] = ""
    """Heading in the report."""
    tensor: ClassVar[str | None] = None
    """Name of the basis in a layer's state; None: it stores none."""
    description: ClassVar[str] = ""
    """Sentences for the report, with {block}; empty where nothing is done."""
    needs_records: ClassVar[bool] = False
    """Whether the basis is chosen from calibration records."""
    needs_hessian: ClassVar[bool] = False
    """Whether it is chosen from the Hessian of the input."""
    smooths: ClassVar[bool] = False
    """Whether exponents of smoothing are among what it tries."""
    decodes: ClassVar[bool] = False
    """Whether `decode` is worth keeping: what it returns may stand for the basis in every method."""
    makes_tensor: ClassVar[bool] = False
    """Whether `input` always returns a new tensor, which may be written to. A class that changes `input` says it anew."""
    kernel: ClassVar[Kernel | None] = None
    """How the GPU quantizer does it, and for "blocks" also `native_input` on a CPU; None: they cannot. A class that changes `input`
    says it anew."""

    block: int = 0

    def __init_subclass__(cls) -> None:
        if "input" in cls.__dict__ and "kernel" not in cls.__dict__:
            cls.kernel = None
        if "input" in cls.__dict__ and "makes_tensor" not in cls.__dict__:
            cls.makes_tensor = False

    def check(self, group_size: int) -> None:
        """Raise FormatError where the blocks do not fit a format with groups of this size."""

    def stored(self, k: int) -> tuple[tuple[int, ...], torch.dtype] | None:
        """(shape, dtype) of the basis of a layer with K input channels; integers or bfloat16, which loaders keep."""
        return None

    def block_of(self, k: int) -> int:
        """Size of the blocks of an input with K channels."""
        return self.block

    @property
    def multiple(self) -> int:
        """K must be a multiple of this."""
        return self.block or 1

    def decode(self, basis: Tensor) -> Tensor:
        """A basis as stored -> as it is computed with."""
        return basis

    def input(self, x: Tensor, basis: Tensor | None) -> Tensor:
        """Input [..., K] -> the input in the basis, in its float dtype."""
        return x

    def weight(self, w_nk: Tensor, basis: Tensor | None) -> Tensor:
        """Weight [N, K] -> float32 [N, K] such that weight(W) @ input(x) = W @ x."""
        return w_nk.float()

    def restore(self, w_nk: Tensor, basis: Tensor | None) -> Tensor:
        """The inverse of `weight`, in float32."""
        return w_nk

    def hessian(self, h_kk: Tensor, basis: Tensor | None) -> Tensor:
        """Sum of x x^T of raw inputs [K, K] -> the same sum of inputs in the basis, in the dtype of `h_kk`."""
        return h_kk

    def candidates(
        self, weights: Sequence[Tensor], h_kk: Tensor | None, rms_k: Tensor, exponents: Sequence[float]
    ) -> Mapping[str, Tensor | None]:
        """Bases to choose from for one input: name -> basis as stored.

        Args:
            weights: the Linears [N_i, K] that read the input, finite.
            h_kk: its Hessian [K, K], finite, where `needs_hessian`.
            rms_k: root mean square of each channel [K].
            exponents: of smoothing, to be tried.
        """
        return {OFF: self.plain(rms_k.shape[0], rms_k.device)}

    def plain(self, k: int, device: torch.device | None = None) -> Tensor | None:
        """The basis of a layer for which nothing was chosen."""
        return None


class Blocked(Transform):
    """Blocks of `block` channels; where that does not divide K, of the largest power of two that does."""

    def block_of(self, k: int) -> int:
        return math.gcd(k, self.block) if self.block else 0

    @property
    def multiple(self) -> int:
        return min(known.BLOCK_SIZES) if self.block else 1


def settle(h_kk: Tensor) -> Tensor:
    """A mixed Hessian without tiny negative diagonal entries, in place.

    Few tokens leave directions without energy; rounding may put them a little below zero.
    """
    diagonal = h_kk.diagonal()
    negligible = (diagonal < 0) & (diagonal > -NEGLIGIBLE * diagonal.mean())
    diagonal.masked_fill_(negligible, 0.0)
    return h_kk


TRANSFORMS: dict[str, type[Transform]] = {}
"""Kind -> class, in the order in which they were registered."""

Kind = TypeVar("Kind", bound=type[Transform])


def register_transform(transform: Kind) -> Kind:
    """Make a transform known by its kind: recipes and checkpoints then take it. Usable as a decorator.

    Raises:
        FormatError: another class has this kind.
    """
    check_name(transform.kind)
    if TRANSFORMS.setdefault(transform.kind, transform) is not transform:
        raise FormatError(f"There is a transform {transform.kind!r} already; give this one another kind.")
    facts = known.KnownTransform(lambda block, group_size: transform(block).check(group_size), transform.smooths)
    known.TRANSFORMS.setdefault(transform.kind, facts)
    return transform


def get_transform(kind: str, block: int) -> Transform:
    """The transform of this kind with blocks of this size; "none" has no blocks, whatever the size.

    Raises:
        FormatError: no such kind.
    """
    if kind not in TRANSFORMS:
        raise known.unknown("transform", kind, TRANSFORMS)
    return TRANSFORMS[kind](block if kind != UNCHANGED.kind else 0)


@register_transform
class Unchanged(Transform):
    """No change of basis."""

    kind = "none"
    kernel = "hadamard"

    def check(self, group_size: int) -> None:
        known.TRANSFORMS["none"].check(self.block, group_size)


UNCHANGED = Unchanged()
"""The layer's own basis."""
