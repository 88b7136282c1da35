"""Clipping search: the scale of each group that gives the smallest weighted rounding error.

The conversion rules of the formats place a group's maximum on the grid; a scale that clips it a little, or wastes a
little of the range, is often better for the group as a whole. Decoding does not depend on how scales were chosen. What is
tried is the format's (`Format.search_scales`); here is what is the same for all: rows at a time, weights of the columns.

The criterion is sum over the group of weight_k (w - q)^2. Error feedback between columns is the solver's business: weights
from the factor's pivots (the cost of an error after feedback) measured the same as diag(H), within 0.02 dB after GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.scheme import Format
from ptq.solvers.rtn import check_weight
from ptq.solvers.stats import SolverError

CHUNK_ELEMENTS_CUDA = 1 << 23
"""Elements a chunk on a GPU; on a CPU they are the format's."""
WEIGHT_FLOOR = 1e-4
"""Columns weigh at least this fraction of the mean, so that channels never seen in calibration keep sane scales."""


def search_scales(
    w_nk: Tensor, fmt: Format, *, weights_k: Tensor | None = None, scale_rule: str | None = None
) -> Tensor:
    """Best scales for a weight.

    Args:
        w_nk: float [N, K].
        weights_k: importance of an error in each column, float [K], >= 0: diag(H) or the factor's pivots. None: equal.
        scale_rule: of the weight, where it limits the search.

    Returns:
        Scales [N, K / group] in the format's stored layout.

    Raises:
        SolverError: non-finite weight, weights of another length or negative.
        FormatError: K is not a multiple of the group, or the format has no search.
    """
    check_weight(w_nk)
    weights = None if weights_k is None else _weights(weights_k, w_nk)
    chunk = CHUNK_ELEMENTS_CUDA if w_nk.is_cuda else fmt.search_elements
    rows = max(1, chunk // w_nk.shape[1])
    return torch.cat([fmt.search_scales(part.float(), weights, scale_rule) for part in w_nk.split(rows)])


def _weights(weights_k: Tensor, w_nk: Tensor) -> Tensor:
    if tuple(weights_k.shape) != (w_nk.shape[1],) or not bool((weights_k >= 0).all()):
        raise SolverError(
            f"Column weights must be {w_nk.shape[1]} numbers >= 0, found shape {list(weights_k.shape)}, minimum {float(weights_k.min()):g}."
        )
    mean = float(weights_k.double().mean())
    if mean == 0:
        return torch.ones_like(weights_k, dtype=torch.float32)
    return (weights_k / mean).float().clamp(min=WEIGHT_FLOOR)
