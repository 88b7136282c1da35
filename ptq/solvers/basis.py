"""The basis a layer is quantized in (smooth, then rotate; or learned blocks), and its inputs as the layer will see them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ptq.scheme import (
    Format,
    decode_blocks,
    rotate_hessian,
    rotate_input,
    rotate_weight,
    smooth_hessian,
    smooth_input,
    smooth_weight,
    transform_hessian,
    transform_input,
    transform_weight,
)
from ptq.solvers.bias import weighted_mean
from ptq.solvers.stats import InputStats

NEGLIGIBLE = 1e-4
"""Share of a Hessian's mean diagonal below which a negative entry is rounding, not an error."""


@dataclass(frozen=True)
class Basis:
    """A change of basis, applied in float32.

    Attributes:
        rotation: size of the blocks, 0 for none.
        smooth_k: factors bfloat16 [K] before a Hadamard rotation, or None.
        learned_gbb: blocks uint8 [K/rotation, rotation, rotation] that take the place of both, or None.
    """

    rotation: int = 0
    smooth_k: Tensor | None = None
    learned_gbb: Tensor | None = None

    @property
    def stored(self) -> Tensor | None:
        """The tensor that the layer has to carry, or None."""
        return self.smooth_k if self.learned_gbb is None else self.learned_gbb

    def weight(self, w_nk: Tensor) -> Tensor:
        """float [N, K] -> float32 [N, K] such that weight(W) @ input(x) = W @ x."""
        if self.learned_gbb is not None:
            return transform_weight(w_nk, decode_blocks(self.learned_gbb))
        return rotate_weight(smooth_weight(w_nk.float(), self.smooth_k), self.rotation)

    def input(self, x: Tensor) -> Tensor:
        """float [..., K] -> float32 [..., K]."""
        if self.learned_gbb is not None:
            return transform_input(x, decode_blocks(self.learned_gbb))
        return rotate_input(smooth_input(x.float(), self.smooth_k), self.rotation)

    def hessian(self, h_kk: Tensor) -> Tensor:
        """Sum of x x^T of raw inputs -> the same sum of inputs in this basis, in the dtype of `h_kk`."""
        if self.learned_gbb is not None:
            changed = transform_hessian(h_kk, decode_blocks(self.learned_gbb))
        else:
            changed = rotate_hessian(smooth_hessian(h_kk, self.smooth_k), self.rotation)
        if self.rotation:
            # Few tokens leave directions without energy; rounding may put them a little below zero.
            diagonal = changed.diagonal()
            negligible = (diagonal < 0) & (diagonal > -NEGLIGIBLE * diagonal.mean())
            diagonal.masked_fill_(negligible, 0.0)
        return changed


@dataclass(frozen=True)
class QuantizedInputs:
    """Sample tokens in the basis, before and after the format's dynamic quantization.

    Attributes:
        x_tk, xq_tk: float32 [T, K]. w_t: weights [T].
        mean_k: mean of x over all calibration tokens, float64 [K].
        mean_quantized_k: mean of Q(x): `mean_k` plus the mean change on the sample, so that the sample's own mean,
            which is noisier, cancels. float64 [K].
    """

    x_tk: Tensor
    xq_tk: Tensor
    w_t: Tensor
    mean_k: Tensor
    mean_quantized_k: Tensor

    @classmethod
    def of(
        cls, stats: InputStats, basis: Basis, fmt: Format, *, scale_rule: str | None, ties: str | None
    ) -> QuantizedInputs:
        """Quantize the sample of `stats`."""
        x = basis.input(stats.x_tk)
        xq = fmt.fake_quantize(x, scale_rule=scale_rule, ties=ties)
        mean = basis.input(stats.mean_k).double()
        return cls(x, xq, stats.w_t, mean, mean + weighted_mean(xq.double() - x.double(), stats.w_t))
