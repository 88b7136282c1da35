"""Conversions of a solve on a GPU: the activation quantizer's kernel, one launch each (`ptq.solvers.conversion`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.runtime.backends import has_triton
from ptq.scheme import Codes, Format, Scheme


class KernelConversion:
    """By `ptq.runtime.kernels.quantize`. Formats and transforms without a kernel have `takes` False."""

    @staticmethod
    def takes(scheme: Scheme, device: torch.device) -> bool:
        """Whether a solve of this scheme on this device can be given one."""
        kernels = scheme.format.kernel_id is not None and scheme.transform.kernel is not None
        return device.type == "cuda" and kernels and has_triton()

    def input(self, x_tk: Tensor, basis: Tensor | None, scheme: Scheme) -> Tensor:
        """Tokens float32 [T, K] -> values in the basis, float32; every format is exact in the kernel's bfloat16."""
        from ptq.runtime.kernels.quantize import quantize

        return quantize(x_tk, basis, scheme, "bf16").values.float()

    def weight(self, w_nk: Tensor, fmt: Format, scale_rule: str | None) -> Codes:
        """Weight float32 [N, K] -> codes."""
        from ptq.runtime.kernels.quantize import quantize

        converted = quantize(w_nk, None, Scheme(fmt, input_rule=scale_rule), "packed")
        assert converted.scales is not None
        return fmt.unpack(converted.values, converted.scales)
