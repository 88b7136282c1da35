"""`QuantLinear`: a Linear whose weight is stored in packed 4-bit codes and whose input is quantized at every call.

It equals the fake-quant reference (dequantized weight, fake-quantized input) up to the accumulation of the product. How
it is computed is decided per call and device: `ptq.runtime.backends` chooses, `ptq.runtime.ops` runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq import formats
from ptq.runtime import cpu, ops
from ptq.runtime.spec import QuantSpec
from ptq.scheme import Codes, decode_blocks, restore_weight, rotate_weight, rotation_scales


class QuantLinear(nn.Module):
    """W4A4 replacement of nn.Linear.

    State: `weight_packed` uint8 [N, K/2], `weight_scale` [N, K/group] (dtype of the format), `bias` float [N] or
    absent, and what `spec` asks for: `smooth` bfloat16 [K] or `transform` uint8 [K/B, B, B]. All are parameters without
    gradient, so that device maps, offloading hooks and state dicts treat them like any weight.

    Args:
        in_features, out_features: K and N; K must be a multiple of the group and of the rotation block.
        bias: whether the layer has a bias.
        spec: the numerics.
        device, dtype: where and in which float dtype to create bias (packed dtypes are fixed).

    Raises:
        FormatError: K does not fit the format.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: QuantSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        fmt = formats.get(spec.format)
        if in_features % max(fmt.group_size, spec.rotation):
            raise formats.FormatError(
                f"A layer with K = {in_features} cannot be {spec.format} with rotation {spec.rotation}: K must be a multiple of {max(fmt.group_size, spec.rotation)}."
            )
        self.weight_packed = _frozen(torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device))
        scale_shape = (out_features, in_features // fmt.group_size)
        self.weight_scale = _frozen(torch.empty(scale_shape, dtype=fmt.scale_dtype, device=device))
        self.bias = _frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.smooth = self.transform = None
        if spec.smooth:
            self.smooth = _frozen(torch.empty(in_features, dtype=torch.bfloat16, device=device))
        if spec.learned:
            blocks = (in_features // spec.rotation, spec.rotation, spec.rotation)
            self.transform = _frozen(torch.empty(blocks, dtype=torch.uint8, device=device))

    @classmethod
    def from_codes(cls, codes: Codes, spec: QuantSpec, bias: Tensor | None, basis: Tensor | None) -> QuantLinear:
        """A layer holding given codes (weight already in the transformed basis), bias [N], and smooth [K] or transform
        [K/B, B, B] as `spec` says."""
        packed, scale = formats.get(spec.format).pack(codes)
        n, k = codes.elements.shape
        layer = cls(k, n, bias is not None, spec, device="meta")
        layer.weight_packed, layer.weight_scale = _frozen(packed), _frozen(scale)
        layer.bias = None if bias is None else _frozen(bias)
        if spec.basis_name is not None:
            setattr(layer, spec.basis_name, None if basis is None else _frozen(basis))
        return layer

    @property
    def basis(self) -> Tensor | None:
        """The tensor that `spec`'s change of basis needs: `transform`, `smooth` or None."""
        return self.transform if self.spec.learned else self.smooth

    def codes(self) -> Codes:
        """The unpacked codes."""
        return formats.get(self.spec.format).unpack(self.weight_packed, self.weight_scale)

    def dequantize(self) -> Tensor:
        """The weight in the original basis as float32 [N, K]: what plain `x @ W.T` would need (the change of
        basis undone; input quantization is not part of it)."""
        weight = cpu.decode(self.weight_packed, self.weight_scale, self.spec.format)
        if self.transform is not None:
            return restore_weight(weight, decode_blocks(self.transform))
        if self.spec.rotation:
            input_factor, weight_factor = rotation_scales(self.spec.rotation)
            weight = rotate_weight(weight, self.spec.rotation) * (input_factor / weight_factor)
        return weight if self.smooth is None else weight * self.smooth.float()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] of any float dtype -> [..., N] in the same dtype.

        Raises:
            UsageError: a forced backend cannot run this layer here.
        """
        return ops.linear(x, self.weight_packed, self.weight_scale, self.bias, self.basis, self.spec)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
