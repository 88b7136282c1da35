"""The weight of a quantized layer as one value: it travels through the runtime, only the custom operator flattens it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq.known import RESIDUAL_BLOCK
from ptq.scheme import Scheme
from ptq.scheme.residual import columns, from_flags, repeated


@dataclass(frozen=True)
class PackedWeight:
    """What a quantized Linear holds, N output and K input features.

    Attributes:
        codes, scales: `weight_packed` uint8 [N, K/2] and `weight_scale` [N, K/group], as in a checkpoint.
        bias: any float [N], or None.
        basis: what the scheme's transform stores, or None.
        scheme: the numerics.
        residual: which blocks of the input have a residual, bool [K / 64] on the CPU, or None (`ptq.scheme.residual`).
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    basis: Tensor | None
    scheme: Scheme
    residual: Tensor | None = None

    @property
    def n(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return 2 * self.codes.shape[1]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks that have a residual."""
        return from_flags(self.residual)

    @property
    def width(self) -> int:
        """Channels of the product: those of the input, and of the residuals behind them."""
        return self.k + RESIDUAL_BLOCK * len(self.blocks)

    def decode(self, rows: slice = slice(None)) -> Tensor:
        """Exact values of some output rows, in the basis: float32 [rows, K]."""
        return self.scheme.format.decode_packed(self.codes[rows], self.scales[rows])

    def operand(self, rows: slice = slice(None)) -> Tensor:
        """`decode`, with the columns of residual blocks once more: float32 [rows, width]."""
        values = self.decode(rows)
        return torch.cat((values, columns(values, self.blocks)), -1) if self.blocks else values

    def widened(self) -> PackedWeight:
        """The same with the codes of residual blocks once more behind the others; its input has `width` channels."""
        if not self.blocks:
            return self
        codes = torch.cat((self.codes, repeated(self.codes, self.blocks, self.k)), -1)
        scales = torch.cat((self.scales, repeated(self.scales, self.blocks, self.k)), -1)
        return replace(self, codes=codes, scales=scales, residual=None)
