"""How a quantized layer treats its input and weight: one small value shared by checkpoint, runtime and solvers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ptq import formats
from ptq.transforms import rotate_input, rotate_weight, smooth_input, smooth_weight


@dataclass(frozen=True)
class QuantSpec:
    """The numerics of one quantized Linear.

    Attributes:
        format: "mxfp4" or "hif4", for weight and input alike.
        rotation: block Hadamard size, 0 for none.
        smooth: whether the layer carries a `smooth` vector [K].
        scale_rule: scale rule of the dynamic input quantization (format default where None).
        ties: rounding of ties in the input quantization (format default where None).
    """

    format: str
    rotation: int = 0
    smooth: bool = False
    scale_rule: str | None = None
    ties: str | None = None

    def transform_input(self, x: Tensor, smooth_k: Tensor | None) -> Tensor:
        """Input [..., K] -> smoothed and rotated input, the basis in which it is quantized."""
        return rotate_input(smooth_input(x, smooth_k), self.rotation)

    def transform_weight(self, w_nk: Tensor, smooth_k: Tensor | None) -> Tensor:
        """Weight [N, K] -> the weight in the same basis, such that the layer's output is unchanged."""
        return rotate_weight(smooth_weight(w_nk, smooth_k), self.rotation)

    def quantize_input(self, x: Tensor, smooth_k: Tensor | None) -> Tensor:
        """Input [..., K] of any float dtype -> float32 values on the format's grid: smooth, rotate, quantize."""
        transformed = self.transform_input(x.float(), smooth_k)
        return formats.get(self.format).fake_quantize(transformed, scale_rule=self.scale_rule, ties=self.ties)
