"""How a quantized layer treats its input and weight: one small value shared by checkpoint, runtime and solvers.

Input and weight are quantized in another basis than the layer's own. What the change of basis stores besides the rule is
one tensor, called `basis` wherever layers run: the smoothing vector, the blocks of a learned transform, or None.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq import formats
from ptq.scheme import (
    decode_blocks,
    rotate_input,
    rotate_weight,
    smooth_input,
    smooth_weight,
    transform_input,
    transform_weight,
)


@dataclass(frozen=True)
class QuantSpec:
    """The numerics of one quantized Linear.

    Attributes:
        format: "mxfp4" or "hif4", for weight and input alike.
        rotation: block size of the transform, 0 for none.
        smooth: whether the layer carries a `smooth` vector bfloat16 [K], applied before the rotation.
        scale_rule: scale rule of the dynamic input quantization (format default where None).
        ties: rounding of ties in the input quantization (format default where None).
        learned: whether the layer carries its own blocks, `transform` uint8 [K/rotation, rotation, rotation] (see
            `ptq.scheme.learned`), in place of smoothing and Hadamard.

    Raises:
        FormatError: a learned transform with smoothing, or whose blocks do not hold whole groups.
    """

    format: str
    rotation: int = 0
    smooth: bool = False
    scale_rule: str | None = None
    ties: str | None = None
    learned: bool = False

    def __post_init__(self) -> None:
        group = formats.get(self.format).group_size
        if self.learned and (self.smooth or not self.rotation or self.rotation % group):
            raise formats.FormatError(
                f"A learned transform has blocks of a multiple of the {self.format} group ({group}) and no smoothing vector beside it; found blocks of {self.rotation}, smoothing {self.smooth}. Set rotation to 64 or 128, or switch learned_transform off."
            )

    @property
    def basis_name(self) -> str | None:
        """Name of the basis tensor in a layer's state, None where there is none."""
        return "transform" if self.learned else "smooth" if self.smooth else None

    def basis_bytes(self, k: int) -> int:
        """Bytes of the basis tensor of a layer with K input channels."""
        return k * self.rotation if self.learned else 2 * k if self.smooth else 0

    def transform_input(self, x: Tensor, basis: Tensor | None) -> Tensor:
        """Input [..., K] -> the input in the basis in which it is quantized.

        Args:
            basis: as stored; learned blocks may be decoded already.
        """
        if self.learned:
            assert basis is not None
            return transform_input(x, decode_blocks(basis, x.dtype) if basis.dtype == torch.uint8 else basis)
        return rotate_input(smooth_input(x, basis), self.rotation)

    def transform_weight(self, w_nk: Tensor, basis: Tensor | None) -> Tensor:
        """Weight [N, K] -> the weight in the same basis, such that the layer's output is unchanged."""
        if self.learned:
            assert basis is not None
            return transform_weight(w_nk, decode_blocks(basis))
        return rotate_weight(smooth_weight(w_nk, basis), self.rotation)

    def quantize_input(self, x: Tensor, basis: Tensor | None) -> Tensor:
        """Input [..., K] of any float dtype -> float32 values on the format's grid: change of basis, then quantize."""
        transformed = self.transform_input(x.float(), basis)
        return formats.get(self.format).fake_quantize(transformed, scale_rule=self.scale_rule, ties=self.ties)
