"""Muon: momentum whose matrix updates are orthogonalised by Newton-Schulz steps, batched over equal shapes.

Learns a small transformer in fewer steps than AdamW does; used for the Linears inside the blocks
only. Everything else is trained with AdamW.
"""

from __future__ import annotations

import torch


def _orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly orthogonal factor of each matrix of float32 ``[n, r, c]``."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(1, 2)
        x = a * x + (b * s + c * s @ s) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; a convolution kernel is the matrix [out, in * positions]."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, params in shapes.items():
                rows, cols = shape[0], int(torch.Size(shape[1:]).numel())
                updates = []
                for p in params:
                    state = self.state[p]
                    if "m" not in state:
                        state["m"] = torch.zeros_like(p)
                    m = state["m"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]).view(rows, cols))
                ortho = _orthogonalise(torch.stack(updates))
                for p, u in zip(params, ortho, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u.view(shape), alpha=-group["lr"] * max(1.0, rows / cols) ** 0.5)
