"""What the solvers know about one layer input: `InputStats`, and the error they raise when it cannot be used.

A plain value. Who gathers it (the replay of a video model, `quantize_module`) is somebody else's business; several
Linears that read the same tensor (q, k, v) share one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq.errors import PtqError


class SolverError(PtqError, ValueError):
    """Weights or statistics from which no quantized layer can be computed; the text names the cause."""


@dataclass(frozen=True)
class InputStats:
    """Statistics of one input over the calibration tokens, before any change of basis.

    Attributes:
        h_kk: sum over tokens of x_t x_t^T, float32 or float64 [K, K]; None where only rounding to nearest is wanted.
        absmax_k: max |x| over all tokens, float [K].
        total_tokens: all tokens, those that tokens in `h_kk` stand for included.
        n_tokens: how many tokens are in `h_kk` (without one: all).
        x_tk: sample tokens, float32 [T, K]: what activation errors are measured on.
    """

    h_kk: Tensor | None
    absmax_k: Tensor
    total_tokens: int
    n_tokens: int
    x_tk: Tensor

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or len(self.x_tk) < 1:
            raise SolverError(
                f"Input statistics hold {self.n_tokens} tokens and {len(self.x_tk)} sample tokens; at least one of each is needed."
            )
        k = self.k
        shapes = {
            "h_kk": (None if self.h_kk is None else tuple(self.h_kk.shape), None if self.h_kk is None else (k, k)),
            "x_tk": (tuple(self.x_tk.shape), (len(self.x_tk), k)),
        }
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise SolverError(f"Input statistics: {name} has shape {found}, expected {expected}.")
        for name in ("absmax_k", "x_tk"):
            if not torch.isfinite(getattr(self, name)).all():
                raise SolverError(
                    f"Input statistics: {name} holds NaN or infinity, so the model produced non-finite activations on the calibration records. Check the records and the model's weights."
                )

    @classmethod
    def from_tokens(cls, x_tk: Tensor, *, sample: int | None = None, dtype: torch.dtype = torch.float32) -> InputStats:
        """Statistics of tokens that fit in memory, float [T, K].

        Args:
            sample: keep this many evenly spaced tokens as the sample (default: all).
            dtype: of `h_kk`.
        """
        x = x_tk.to(dtype)
        picked = torch.linspace(0, len(x_tk) - 1, min(sample or len(x_tk), len(x_tk)), device=x_tk.device)
        return cls(x.T @ x, x_tk.abs().amax(0).float(), len(x_tk), len(x_tk), x_tk.float()[picked.round().long()])

    def to(self, device: torch.device) -> InputStats:
        """The same on another device; itself where it is there, checked already."""
        if self.x_tk.device == device:
            return self
        h_kk = None if self.h_kk is None else self.h_kk.to(device)
        return replace(self, h_kk=h_kk, absmax_k=self.absmax_k.to(device), x_tk=self.x_tk.to(device))

    @property
    def k(self) -> int:
        """Channels of the input."""
        return len(self.absmax_k)

    @property
    def rms_k(self) -> Tensor:
        """Root mean square of each channel over all tokens (the sample without a Hessian), float32 [K]."""
        if self.h_kk is None:
            return self.x_tk.double().square().mean(0).sqrt().float()
        return (self.h_kk.diagonal() / float(self.total_tokens)).clamp(min=0).sqrt().float()
