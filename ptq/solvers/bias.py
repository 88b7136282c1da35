"""Bias correction: give the layer back the mean output that quantization took away. Free at run time."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mean(x_tk: Tensor, w_t: Tensor) -> Tensor:
    """Mean of tokens [T, K] under weights [T], float64 [K]."""
    return w_t.double() @ x_tk.double() / w_t.double().sum()


def bias_correction(w_nk: Tensor, wq_nk: Tensor, mean_k: Tensor, mean_quantized_k: Tensor) -> Tensor:
    """Mean over tokens of (W x - Wq Q(x)), to be added to the bias; float32 [N].

    All in the space of the weight (smoothed, rotated). Exact by linearity: only the two mean inputs matter.

    Args:
        w_nk, wq_nk: original and quantized weight, float [N, K].
        mean_k, mean_quantized_k: mean of x and of Q(x), float [K].
    """
    mean_k, mean_quantized_k = mean_k.double(), mean_quantized_k.double()
    return (w_nk.double() @ mean_k - wq_nk.double() @ mean_quantized_k).to(torch.float32)
