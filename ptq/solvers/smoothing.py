"""Smoothing factors of one input: x * s online, W / s offline.

s_k = (size of the weights' column k)^(1 - alpha) / (size of channel k)^alpha, SmoothQuant's rule (arXiv 2211.10438)
with size = root mean square instead of the maximum. Behind a block rotation an error is spread over the block, so what
counts is the energy of the block in x and in W; their product is smallest at alpha = 0.5 with root mean squares
(Cauchy-Schwarz), and a single extreme token does not move it. Measured against maxima (correlated Gaussians with outlier
channels, GPTQ, held-out tokens): MXFP4 +0.3 dB, HiF4 +0.4 dB. Which alpha, if any, is searched by `basis_search`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LIMIT = 2.0**12
"""Factors stay within [1 / LIMIT, LIMIT] of their geometric mean."""


def smoothing_factors(x_size_k: Tensor, w_size_k: Tensor, alpha: float) -> Tensor:
    """Factors s [K] in bfloat16 for an exponent alpha in [0, 1].

    Args:
        x_size_k: size of each input channel, float [K], >= 0 (root mean square or maximum).
        w_size_k: size of each weight column over all Linears that share the input, float [K], >= 0.

    Channels with nothing in them (size 0 on either side) get the geometric mean of the others, which is 1.
    """
    x, w = x_size_k.double(), w_size_k.double()
    used = (x > 0) & (w > 0)
    log_s = torch.where(used, (1 - alpha) * torch.log(w) - alpha * torch.log(x), 0.0)
    mean = log_s.sum() / used.sum().clamp(min=1)
    factors = torch.where(used, torch.exp(log_s - mean), 1.0)
    return factors.clamp(1 / LIMIT, LIMIT).to(torch.bfloat16)


def column_size(weights: Sequence[Tensor]) -> Tensor:
    """Root mean square of each column over Linears [N_i, K] that share an input, each at equal total energy."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    for w_nk in weights:
        energy = w_nk.float().square().sum(0, dtype=torch.float64)
        total += energy / energy.sum().clamp(min=1e-300)
    return total.sqrt().float()
