"""Formats and transforms by name, and what a request for them is checked against before torch is loaded.

What ships stands here; `ptq.scheme` takes these facts from here and adds those of what a user registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ptq.errors import FormatError

BLOCK_SIZES = (16, 32, 64, 128)
"""Of a Hadamard rotation and of learned blocks."""
RESIDUAL_BLOCK = 64
"""Input channels of a residual block (`ptq.scheme.residual`): whole groups of every format that has them."""


@dataclass(frozen=True)
class KnownFormat:
    """Facts of a format; each is an attribute of that name of `ptq.scheme.Format`."""

    title: str
    group_size: int
    scale_rules: tuple[str, ...]
    searched_scales: str | None = None


@dataclass(frozen=True)
class KnownTransform:
    """Facts of a transform.

    Attributes:
        check: (block size, group size of the format) -> None; raises FormatError where the blocks do not fit.
        smooths: whether it tries exponents of smoothing, and `needs_exponents`: cannot do without.
    """

    check: Callable[[int, int], None]
    smooths: bool = False
    needs_exponents: bool = False


def _no_blocks(block: int, group_size: int) -> None:
    if block:
        raise FormatError(f"Without a transform there are no blocks, found blocks of {block}.")


def _hadamard_blocks(block: int, group_size: int) -> None:
    if block not in BLOCK_SIZES:
        raise FormatError(f"Hadamard block size {block} is not supported; choose one of {BLOCK_SIZES}.")


def _optional_blocks(block: int, group_size: int) -> None:
    if block:
        _hadamard_blocks(block, group_size)


def _learned_blocks(block: int, group_size: int) -> None:
    if block not in BLOCK_SIZES or block % group_size:
        raise FormatError(
            f"A learned transform has blocks of one of {BLOCK_SIZES} channels that hold whole groups of {group_size}; found blocks of {block}. Set scheme.block to 64 or 128, or choose another scheme.transform."
        )


FORMATS: dict[str, KnownFormat] = {
    "mxfp4": KnownFormat(
        "MXFP4", 32, ("floor", "ceil", "even", "qmax7.25", "mse"), "exponents one below to one above the rule's"
    ),
    "hif4": KnownFormat(
        "HiF4", 64, ("reference", "mse", "p2"), "scale codes four below to two above the rule's, micro-exponents free"
    ),
}
"""Name -> format, in the order in which they were registered."""
TRANSFORMS: dict[str, KnownTransform] = {
    "none": KnownTransform(_no_blocks),
    "hadamard": KnownTransform(_hadamard_blocks),
    "smoothed": KnownTransform(_optional_blocks, smooths=True, needs_exponents=True),
    "learned": KnownTransform(_learned_blocks, smooths=True),
}
"""Kind -> transform, in the order in which they were registered."""


def find_format(name: str) -> KnownFormat:
    """The format of this name.

    Raises:
        FormatError: there is none.
    """
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]


def find_transform(kind: str) -> KnownTransform:
    """The transform of this kind.

    Raises:
        FormatError: there is none.
    """
    if kind not in TRANSFORMS:
        raise unknown("transform", kind, TRANSFORMS)
    return TRANSFORMS[kind]


def unknown(what: str, name: str, names: Iterable[str]) -> FormatError:
    """The error for a name that is none of `names`; `what` it should be the name of."""
    return FormatError(f"Unknown {what} {name!r}; choose one of {', '.join(names)}.")


def check_rule(format_name: str, rules: Sequence[str], rule: str) -> None:
    """Raise FormatError where a format with these scale rules does not have this one."""
    if rule not in rules:
        raise FormatError(f"{format_name} has no scale rule {rule!r}; choose one of {', '.join(rules)}.")
