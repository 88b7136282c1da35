"""Gathering the statistics of layer inputs while records run through a block.

One collector for each distinct input. All tokens go into the maxima, all or a seeded subsample into the
Hessian; another seeded subsample is kept for searches that need activations themselves. Sums are float32 on the device of the
activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ptq.solvers.stats import InputStats

COLUMNS = 1024
"""Columns of a Hessian that are updated by one product."""
TOKENS = 2048
"""Tokens that a CPU converts to float32 at a time."""


class InputCollector:
    """Accumulates `InputStats` of one input of width K.

    Args:
        sample_per_record: tokens kept of each update.
        hessian: accumulate sum x x^T too (K x K); without it the statistics serve rounding to nearest only.
        hessian_tokens: tokens of each update that go into it, weighted up to stand for all; None: all.
        seed: of the token subsamples.
    """

    def __init__(
        self, sample_per_record: int, *, hessian: bool, hessian_tokens: int | None = None, seed: int = 0
    ) -> None:
        self._sample, self._hessian, self._hessian_tokens = sample_per_record, hessian, hessian_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._h_kk: Tensor | None = None
        self._absmax_k: Tensor | None = None
        self._total = self._tokens = 0
        self._samples: list[Tensor] = []

    def update(self, x: Tensor, *, batched: bool = False) -> None:
        """Add the tokens of x [..., K]; where it is `batched`, [R, ..., K], as R updates. There may be no token (an expert of a
        mixture that nothing was sent to)."""
        k = x.shape[-1]
        x_tk = x.reshape(-1, k)
        if not len(x_tk):
            return
        if self._absmax_k is None:
            self._absmax_k = torch.zeros(k, device=x_tk.device)
            self._h_kk = torch.zeros(k, k, device=x_tk.device) if self._hessian else None
        largest = torch.maximum(*(edge.abs() for edge in torch.aminmax(x_tk, dim=0)))
        torch.maximum(self._absmax_k, largest.float(), out=self._absmax_k)
        self._total += len(x_tk)
        for part in x_tk.chunk(len(x) if batched else 1):
            self._tokens += len(part) if self._h_kk is None else self._add_to_hessian(part)
            self._samples.append(self._some(part, self._sample).to(torch.float32, copy=True))

    def _add_to_hessian(self, x_tk: Tensor) -> int:
        """Returns how many tokens were added."""
        assert self._h_kk is not None
        total = len(x_tk)
        if self._hessian_tokens is not None and self._hessian_tokens < total:
            x_tk = self._some(x_tk, self._hessian_tokens)
        # Symmetric: only blocks on and above the diagonal are computed, `stats` mirrors them.
        for start in range(0, x_tk.shape[1], COLUMNS):
            part = slice(start, start + COLUMNS)
            above = x_tk[:, : part.stop]
            add_product(self._h_kk[: part.stop, part], above, x_tk[:, part], total / len(x_tk))
        return len(x_tk)

    def _some(self, x_tk: Tensor, count: int) -> Tensor:
        """`count` of the tokens, in their order; all where there are no more."""
        order = torch.randperm(len(x_tk), generator=self._generator)
        return x_tk if count >= len(x_tk) else x_tk[order[:count].sort().values.to(x_tk.device)]

    def stats(self) -> InputStats:
        """The statistics so far.

        Raises:
            SolverError: no tokens, or non-finite activations.
        """
        if self._absmax_k is None:
            return InputStats(None, torch.zeros(0), 0, 0, torch.zeros(0, 0))
        if self._h_kk is not None:
            for start in range(COLUMNS, len(self._h_kk), COLUMNS):
                part = slice(start, start + COLUMNS)
                self._h_kk[part, :start] = self._h_kk[:start, part].T
        return InputStats(self._h_kk, self._absmax_k, self._total, self._tokens, torch.cat(self._samples))


def add_product(h_ab: Tensor, a_ta: Tensor, b_tb: Tensor, factor: float) -> Tensor:
    """Add factor * a^T b to float32 [A, B], in place. Products are exact where the tokens [T, A] and [T, B] are bfloat16.

    A GPU multiplies bfloat16 as it is and sums in float32. A CPU has no such product: it converts some tokens at a time, never
    all of them.
    """
    if a_ta.dtype == torch.float32:
        return h_ab.addmm_(a_ta.T, b_tb, alpha=factor)
    if a_ta.is_cuda:
        return h_ab.add_(torch.mm(a_ta.T, b_tb, out_dtype=torch.float32), alpha=factor)
    for a, b in zip(a_ta.split(TOKENS), b_tb.split(TOKENS), strict=True):
        h_ab.addmm_(a.float().T, b.float(), alpha=factor)
    return h_ab


@contextlib.contextmanager
def collecting(
    modules: Mapping[str, nn.Module], collectors: Mapping[str, InputCollector], *, batched: bool = False
) -> Iterator[None]:
    """While the model runs, feed each module's input into its collector; see `InputCollector.update` for `batched`."""

    def hook_for(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            collectors[name].update((inputs[0] if inputs else keywords["input"]).detach(), batched=batched)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
