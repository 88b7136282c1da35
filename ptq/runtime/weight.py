"""The weight of a quantized layer as one value: it travels through the runtime, only the custom operator flattens it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ptq.scheme import Scheme


@dataclass(frozen=True)
class PackedWeight:
    """What a quantized Linear holds, N output and K input features.

    Attributes:
        codes, scales: `weight_packed` uint8 [N, K/2] and `weight_scale` [N, K/group], as in a checkpoint.
        bias: any float [N], or None.
        basis: what the scheme's transform stores, or None.
        scheme: the numerics.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    basis: Tensor | None
    scheme: Scheme

    @property
    def n(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return 2 * self.codes.shape[1]

    def decode(self, rows: slice = slice(None)) -> Tensor:
        """Exact values of some output rows, in the basis: float32 [rows, K]."""
        return self.scheme.format.decode_packed(self.codes[rows], self.scales[rows])
