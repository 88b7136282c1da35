"""What the solvers know about one layer input: `InputStats`, and the error they raise when it cannot be used.

A plain value. Who gathers it (the replay of a video model, `quantize_module`) is somebody else's business; several
Linears that read the same tensor (q, k, v) share one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.errors import PtqError


class SolverError(PtqError, ValueError):
    """Weights or statistics from which no quantized layer can be computed; the text names the cause."""


@dataclass(frozen=True)
class InputStats:
    """Statistics of one input over the calibration tokens, before smoothing and rotation.

    Attributes:
        h_kk: sum over tokens of w_t x_t x_t^T, float32 or float64 [K, K]; None where only rounding to nearest is wanted.
        mean_k: weighted mean of x, float [K].
        absmax_k: max |x| over all tokens, float [K].
        weight_sum: sum of w_t over all tokens, those that tokens in `h_kk` stand for included.
        n_tokens: how many tokens are in `h_kk` (without one: in the mean).
        x_tk: sample tokens, float32 [T, K]: what activation errors are measured on.
        w_t: their weights, float32 [T].
    """

    h_kk: Tensor | None
    mean_k: Tensor
    absmax_k: Tensor
    weight_sum: float
    n_tokens: int
    x_tk: Tensor
    w_t: Tensor

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or len(self.w_t) < 1 or not self.weight_sum > 0:
            raise SolverError(
                f"Input statistics hold {self.n_tokens} tokens of total weight {self.weight_sum} and {len(self.w_t)} sample tokens; at least one token with a positive weight is needed."
            )
        k = len(self.mean_k)
        shapes = {
            "h_kk": (None if self.h_kk is None else tuple(self.h_kk.shape), None if self.h_kk is None else (k, k)),
            "absmax_k": (tuple(self.absmax_k.shape), (k,)),
            "x_tk": (tuple(self.x_tk.shape), (len(self.w_t), k)),
        }
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise SolverError(f"Input statistics: {name} has shape {found}, expected {expected}.")
        for name in ("mean_k", "absmax_k", "x_tk", "w_t"):
            if not torch.isfinite(getattr(self, name)).all():
                raise SolverError(
                    f"Input statistics: {name} holds NaN or infinity, so the model produced non-finite activations on the calibration records. Check the records and the model's weights."
                )

    @classmethod
    def from_tokens(
        cls, x_tk: Tensor, w_t: Tensor | None = None, *, sample: int | None = None, dtype: torch.dtype = torch.float32
    ) -> InputStats:
        """Statistics of tokens that fit in memory: x_tk float [T, K], w_t float [T] (default: ones).

        Args:
            sample: keep this many evenly spaced tokens as the sample (default: all).
            dtype: of `h_kk`.
        """
        w_t = torch.ones(len(x_tk), device=x_tk.device) if w_t is None else w_t.float()
        x = x_tk.to(dtype)
        weight_sum = float(w_t.sum())
        count = min(sample or len(x_tk), len(x_tk))
        picked = torch.linspace(0, len(x_tk) - 1, count, device=x_tk.device).round().long()
        return cls(
            h_kk=(x * w_t.to(dtype).unsqueeze(-1)).T @ x,
            mean_k=(w_t.to(dtype) @ x / max(weight_sum, 1e-30)).float(),
            absmax_k=x_tk.abs().amax(0).float(),
            weight_sum=weight_sum,
            n_tokens=len(x_tk),
            x_tk=x_tk.float()[picked],
            w_t=w_t[picked],
        )

    @property
    def rms_k(self) -> Tensor:
        """Weighted root mean square of each channel over all tokens (the sample without a Hessian), float32 [K]."""
        if self.h_kk is None:
            return (self.w_t.double() @ self.x_tk.double().square() / self.w_t.double().sum()).sqrt().float()
        return (self.h_kk.diagonal() / self.weight_sum).clamp(min=0).sqrt().float()
