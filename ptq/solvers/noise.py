"""Calibration against quantized inputs (asymmetric), with the input quantizer reduced to two numbers a group.

The layer multiplies Q(x), not x. The best weight for it minimises the mean of |W x - V Q(x)|^2, which is plain GPTQ on
H_qq = sum Q(x) Q(x)^T towards the target W H_xq H_qq^-1. Accumulating both K x K matrices needs a second pass over the
records after smoothing is chosen, and regressing on few tokens overfits. The quantizer is far simpler than that: within a
group, Q(x) = a x + n with n uncorrelated with x and alike in all columns (exactly the rotated case). Two moments a group
from the sample tokens give a and the variance of n, and then H_qq = A H A + N and H_xq = H A follow from the ordinary
Hessian of all tokens. Measured (correlated Gaussians with outlier channels, smoothing + rotation + GPTQ, held-out
tokens): MXFP4 floor +0.5 dB, MXFP4 even +0.25 dB, HiF4 +0.1 dB; the same with 128 sample tokens, whereas the two full
matrices from 8 tokens a channel lose 0.3 to 0.7 dB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.solvers.basis import QuantizedInputs
from ptq.solvers.factor import Factor


@dataclass(frozen=True)
class InputNoise:
    """Q(x) = gain * x + noise.

    Attributes:
        gain_k: float32 [K], equal within a group, > 0.
        variance_k: float32 [K], mean square of the noise for one token, equal within a group.
    """

    gain_k: Tensor
    variance_k: Tensor

    @classmethod
    def measure(cls, inputs: QuantizedInputs, group_size: int) -> InputNoise:
        """Least-squares fit on the sample tokens. Groups without signal, or all quantized to zero, get gain 1."""
        x, xq = inputs.x_tk.double(), inputs.xq_tk.double()
        w_t = inputs.w_t.double() / inputs.w_t.double().sum()

        def moment(product: Tensor) -> Tensor:
            return (w_t @ product).reshape(-1, group_size).mean(-1)

        xx, xq_x, qq = moment(x * x), moment(xq * x), moment(xq * xq)
        usable = (xx > 0) & (xq_x > 0)
        gain = torch.where(usable, xq_x / torch.where(usable, xx, 1.0), 1.0)
        variance = (qq - 2 * gain * xq_x + gain.square() * xx).clamp(min=0)
        return cls(*(v.float().repeat_interleave(group_size) for v in (gain, variance)))

    def hessian(self, h_kk: Tensor, weight_sum: float) -> Tensor:
        """Sum of w x x^T [K, K] over tokens of this total weight -> the same of Q(x): A H A + N."""
        gain = self.gain_k.to(h_kk.dtype)
        quantized = h_kk * gain * gain.unsqueeze(-1)
        # A channel that calibration never saw stays exactly dead.
        noise = self.variance_k.to(h_kk.dtype) * weight_sum * (h_kk.diagonal() > 0)
        quantized.diagonal().add_(noise)
        return quantized

    def target(self, w_nk: Tensor, factor: Factor, weight_sum: float) -> Tensor:
        """The weight that is best in front of Q(x): W H_xq H_qq^-1, float32 [N, K].

        `factor` is of `hessian(...)`; its damping pulls towards W / gain. Uses H_xq = A^-1 (H_qq - N).
        """
        scaled = w_nk / self.gain_k
        return scaled - factor.solve_right(scaled * (self.variance_k * weight_sum)).float()
