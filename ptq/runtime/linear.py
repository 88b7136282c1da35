"""`QuantLinear`: a Linear whose weight is stored in packed 4-bit codes and whose input is quantized at every call.

It equals the fake-quant reference (dequantized weight, fake-quantized input) up to the accumulation of the product. How
it is computed is decided per call and device: `ptq.runtime.backends` chooses, `ptq.runtime.ops` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import UsageError
from ptq.runtime import ops
from ptq.runtime.unreadable import REFUSAL, UnreadableWeight
from ptq.runtime.weight import PackedWeight
from ptq.scheme import Codes, Scheme
from ptq.scheme.residual import check_blocks, to_flags


class QuantLinear(nn.Linear):
    """W4A4 replacement of nn.Linear, and one to libraries that look for Linears (PEFT puts its adapters beside it).

    State: `weight_packed` uint8 [N, K/2], `weight_scale` [N, K/group] (dtype of the format), `bias` float [N] or
    absent, and the basis of the scheme's transform under its name (`transform`, `smooth`) where it stores one. All are
    parameters without gradient, so that device maps, offloading hooks and state dicts treat them like any weight.

    Args:
        in_features, out_features: K and N; K must be a multiple of the group and of the transform's block.
        bias: whether the layer has a bias.
        scheme: the numerics.
        residual: numbers of the input blocks that have a residual; None where the recipe gives none to any layer.
        device, dtype: where and in which float dtype to create bias (packed dtypes are fixed).

    `weight` answers dtype, device and shape, and refuses to be read or written; it is no parameter.

    Raises:
        FormatError: K does not fit the scheme, or blocks that K does not have.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        *,
        residual: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight
        scheme.check_width(in_features)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        # No parameter: where offloading moves a layer to, what a kernel is called with is asked of the CPU.
        self.residual: Tensor | None = None
        if residual is not None:
            check_blocks(residual, in_features)
            self.residual = to_flags(residual, in_features)
        tensors = scheme.tensors(out_features, in_features)
        basis = tensors.pop(scheme.transform.tensor or "", None)
        for name, (shape, stored) in tensors.items():
            setattr(self, name, _frozen(torch.empty(shape, dtype=stored, device=device)))
        self.bias = _frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        if basis is not None:
            setattr(self, str(scheme.transform.tensor), _frozen(torch.empty(basis[0], dtype=basis[1], device=device)))

    @classmethod
    def from_codes(
        cls,
        codes: Codes,
        scheme: Scheme,
        bias: Tensor | None,
        basis: Tensor | None,
        residual: Sequence[int] | None = None,
    ) -> QuantLinear:
        """A layer holding given codes (of the weight in the basis), bias [N], the basis as the transform stores it, and
        the numbers of the blocks that have a residual."""
        flags = None if residual is None else to_flags(residual, codes.elements.shape[-1])
        return cls.from_packed(PackedWeight(*scheme.format.pack(codes), bias, basis, scheme, flags))

    @classmethod
    def from_packed(cls, weight: PackedWeight) -> QuantLinear:
        """A layer holding a packed weight."""
        layer = cls(weight.k, weight.n, weight.bias is not None, weight.scheme, device="meta")
        layer.residual = weight.residual
        layer.weight_packed, layer.weight_scale = _frozen(weight.codes), _frozen(weight.scales)
        layer.bias = None if weight.bias is None else _frozen(weight.bias)
        if weight.scheme.transform.tensor is not None:
            assert weight.basis is not None
            setattr(layer, weight.scheme.transform.tensor, _frozen(weight.basis))
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[N, K] in the dtype of the bias (without one, torch's default), without values."""
        dtype = torch.get_default_dtype() if self.bias is None else self.bias.dtype
        return UnreadableWeight((self.out_features, self.in_features), dtype, self.weight_packed.device)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight":
            raise UsageError(REFUSAL)
        super().__setattr__(name, value)  # type: ignore[arg-type]

    @property
    def basis(self) -> Tensor | None:
        """The tensor that the scheme's transform stores, or None."""
        name = self.scheme.transform.tensor
        return None if name is None else getattr(self, name)

    @property
    def packed(self) -> PackedWeight:
        """All that the layer holds, as one value."""
        held: dict[str, Any] = self._parameters  # read at every call: attributes of nn.Module are several times slower
        name = self.scheme.transform.tensor
        basis = None if name is None else held[name]
        own = held["weight_packed"], held["weight_scale"], held.get("bias"), basis, self.scheme
        return PackedWeight(*own, self.residual)

    def codes(self) -> Codes:
        """The unpacked codes."""
        return self.scheme.format.unpack(self.weight_packed, self.weight_scale)

    def dequantize(self) -> Tensor:
        """The weight in the original basis as float32 [N, K]: what plain `x @ W.T` would need (the change of
        basis undone; input quantization is not part of it)."""
        return self.scheme.transform.restore(self.packed.decode(), self.basis)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] of any float dtype -> [..., N] in the same dtype.

        Raises:
            UsageError: a forced backend cannot run this layer here.
        """
        return ops.linear(input, self.packed)

    def extra_repr(self) -> str:
        residual = f", {len(self.packed.blocks)} residual blocks" if self.residual is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.key}{residual}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
