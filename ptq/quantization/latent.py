"""A Linear whose codes are being tuned: latent weights in place of codes, rounded on fixed scales at every call.

Gradients pass both roundings as if they were none (straight-through, arXiv 1308.3432): an input's goes back through the change of basis
alone, a weight's reaches its latent value. Scales, basis and bias do not move.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.quantization.placing import conversion_on
from ptq.scheme import Codes, Format, Scheme
from ptq.solvers.conversion import DEFINITION, Conversion


class SharedInput:
    """The quantized input of several Linears on one device, computed once for as long as they are given one tensor."""

    def __init__(self, scheme: Scheme, basis: Tensor | None, device: torch.device) -> None:
        self._scheme, self._basis = scheme, basis
        self._conversion = conversion_on(device, scheme)
        if self._conversion is DEFINITION and basis is not None:
            self._basis = scheme.transform.decode(basis)
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> its values as at run time, float32 [..., K]."""
        if self._last is None or self._last[0] is not x:
            self._last = x, _QuantizedInput.apply(x, self._scheme, self._basis, self._conversion)
        return self._last[1]

    def forget(self) -> None:
        """Let go of the last input, and with it of the graph behind it."""
        self._last = None


class LatentLinear(nn.Module):
    """A quantized Linear before its codes are final; its only parameter with a gradient is `latent`.

    Args:
        linear: the original.
        codes: of its weight in the basis; their scales stay.
        target_nk: what the codes were rounded from, float32 [N, K].
        shared: its input.
        fmt: the number format.
    """

    def __init__(self, linear: nn.Linear, codes: Codes, target_nk: Tensor, shared: SharedInput, fmt: Format) -> None:
        super().__init__()
        device = linear.weight.device
        self.bias, self._shared, self._fmt = linear.bias, shared, fmt
        self._scales = codes.scales
        self._steps_nk = fmt.steps(codes.scales).to(device)
        self._one = torch.ones((), device=device)
        # In steps, so that one learning rate fits every group. A group of zeros may have a step of zero.
        steps = torch.where(self._steps_nk > 0, self._steps_nk, 1.0)
        self.latent = nn.Parameter(target_nk.to(device) / steps)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] in the input's dtype, in which values of the formats are exact."""
        values = _Rounded.apply(self.latent, self._steps_nk, self._one, self._fmt)
        return F.linear(self._shared(input).to(input.dtype), values.to(input.dtype), self.bias)

    def codes(self) -> Codes:
        """What the latent weights round to, on the device of the scales."""
        elements = self._fmt.encode(self.latent.detach(), self._one)
        return Codes(elements.to(self._scales.device), self._scales)


class _QuantizedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: Scheme, basis: Tensor | None, conversion: Conversion) -> Tensor:
        ctx.transform, ctx.basis, ctx.dtype = scheme.transform, basis, x.dtype
        return conversion.input(x.flatten(0, -2), basis, scheme).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # x' = x M, so the gradient of x is that of x' times M^T, which is what `restore` does to a weight.
        gradient = gradients[0]
        back = ctx.transform.restore(gradient.flatten(0, -2), ctx.basis)
        return back.view(gradient.shape).to(ctx.dtype), None, None, None


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent_nk: Tensor, steps_nk: Tensor, one: Tensor, fmt: Format) -> Tensor:
        ctx.save_for_backward(steps_nk)
        return fmt.decode(fmt.encode(latent_nk, one), steps_nk)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (steps_nk,) = ctx.saved_tensors
        return gradients[0] * steps_nk, None, None, None
