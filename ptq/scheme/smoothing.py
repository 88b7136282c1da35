"""Per-channel smoothing: x * s online, W / s offline (SmoothQuant, arXiv 2211.10438, factor on the input side).

`smooth` is the checkpoint's vector: bfloat16 [K], multiplied into the input. Only the application lives here; choosing
the factors is a search and lives with the solvers.
"""

from __future__ import annotations

from torch import Tensor


def smooth_input(x: Tensor, smooth_k: Tensor | None) -> Tensor:
    """x [..., K] * s [K]; None leaves x unchanged."""
    return x if smooth_k is None else x * smooth_k.to(x.dtype)


def smooth_weight(w_nk: Tensor, smooth_k: Tensor | None) -> Tensor:
    """W [N, K] / s [K], so that smooth_weight(W) @ smooth_input(x) = W @ x."""
    return w_nk if smooth_k is None else w_nk / smooth_k.to(w_nk.dtype)


def smooth_hessian(h_kk: Tensor, smooth_k: Tensor | None) -> Tensor:
    """Hessian of raw inputs -> Hessian of smoothed inputs, D H D with D = diag(s)."""
    if smooth_k is None:
        return h_kk
    s = smooth_k.to(h_kk.dtype)
    return h_kk * s.unsqueeze(0) * s.unsqueeze(1)
