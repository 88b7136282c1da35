"""Choosing the smoothing factors of one input: x * s online, W / s offline.

s_k = (size of the weights' column k)^(1 - alpha) / (size of channel k)^alpha, SmoothQuant's rule (arXiv 2211.10438)
with size = root mean square instead of the maximum. Behind a block rotation an error is spread over the block, so what
counts is the energy of the block in x and in W; their product is smallest at alpha = 0.5 with root mean squares
(Cauchy-Schwarz), and a single extreme token does not move it. Measured against maxima (correlated Gaussians with outlier
channels, GPTQ, held-out tokens): MXFP4 +0.3 dB, HiF4 +0.4 dB. Alpha is searched on the layers' output error with both
sides quantized, and no smoothing at all is always a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.formats import Format
from ptq.solvers.basis import Basis
from ptq.solvers.measure import relative, token_error
from ptq.solvers.rtn import round_to_nearest

OFF = "off"
LIMIT = 2.0**12
"""Factors stay within [1 / LIMIT, LIMIT] of their geometric mean."""
SEARCH_ROWS = 1024
"""Output rows of each Linear that the search looks at, evenly spaced: the error is a mean over rows."""


@dataclass(frozen=True)
class SmoothingResult:
    """The choice and what it was chosen from.

    Attributes:
        alpha: the chosen exponent, None for no smoothing.
        smooth_k: bfloat16 [K], finite and positive; None for no smoothing.
        errors: candidate ("off", "0.5", ...) -> relative output error, averaged over the Linears.
    """

    alpha: float | None
    smooth_k: Tensor | None
    errors: dict[str, float]


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


def search_smoothing(
    weights: Sequence[Tensor],
    x_tk: Tensor,
    w_t: Tensor,
    x_size_k: Tensor,
    fmt: Format,
    *,
    alphas: Sequence[float],
    rotation: int,
    weight_scale_rule: str | None = None,
    activation_scale_rule: str | None = None,
    activation_ties: str | None = None,
) -> SmoothingResult:
    """Try no smoothing and every alpha with rounded weights and quantized inputs; keep the smallest output error.

    Args:
        weights: the Linears [N_i, K] that read this input.
        x_tk: sample tokens float [T, K], raw. w_t: their weights [T].
        x_size_k: size of each channel over all calibration tokens, float [K].
        rotation: block Hadamard size after smoothing, 0 for none.
    """
    rows = [w[:: max(1, len(w) // SEARCH_ROWS)].float() for w in weights]
    targets = [x_tk.float() @ w.T for w in rows]
    w_size_k = column_size(weights)
    candidates: dict[str, tuple[float | None, Tensor | None]] = {OFF: (None, None)}
    for alpha in alphas:
        candidates[f"{alpha:g}"] = (alpha, smoothing_factors(x_size_k, w_size_k, alpha))
    errors = {}
    for name, (_, smooth_k) in candidates.items():
        basis = Basis(smooth_k, rotation)
        xq = fmt.fake_quantize(basis.input(x_tk), scale_rule=activation_scale_rule, ties=activation_ties)
        total = 0.0
        for w, target in zip(rows, targets, strict=True):
            codes = round_to_nearest(basis.weight(w), fmt, scale_rule=weight_scale_rule)
            # A Linear without any output (an all-zero weight) has no say.
            total += relative(*token_error(target, xq @ fmt.dequantize(codes).T, w_t)) or 0.0
        errors[name] = total / len(rows)
    best = min(errors, key=errors.__getitem__)
    return SmoothingResult(*candidates[best], errors)
