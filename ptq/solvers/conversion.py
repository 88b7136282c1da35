"""How a solve converts tensors to the format: as `ptq.scheme` defines it, or by kernels that somebody else brings.

On a CPU the format's own functions are one compiled call. On a GPU they are a hundred launches, so the caller of
`solve_group` hands in kernels there (`ptq.runtime.conversion`).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ptq.scheme import Codes, Format, Scheme


class Conversion(Protocol):
    """Both conversions of a solve."""

    def input(self, x_tk: Tensor, basis: Tensor | None, scheme: Scheme) -> Tensor:
        """`Scheme.quantize_input` of tokens float32 [T, K], equal up to the order of sums in the change of basis."""

    def weight(self, w_nk: Tensor, fmt: Format, scale_rule: str | None) -> Codes:
        """`Format.quantize` of a weight float32 [N, K], code for code."""


class Definition:
    """By the format's and the scheme's own functions."""

    def input(self, x_tk: Tensor, basis: Tensor | None, scheme: Scheme) -> Tensor:
        """See `Conversion`."""
        return scheme.quantize_input(x_tk, basis)

    def weight(self, w_nk: Tensor, fmt: Format, scale_rule: str | None) -> Codes:
        """See `Conversion`."""
        return fmt.quantize(w_nk, scale_rule=scale_rule)


DEFINITION = Definition()
