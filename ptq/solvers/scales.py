"""Clipping search: the scale of each group that gives the smallest weighted rounding error.

The conversion rules of the formats place a group's maximum on the grid; a scale that clips it a little, or wastes a
little of the range, is often better for the group as a whole. Decoding does not depend on how scales were chosen, so the
result is plain MXFP4 or HiF4.

 - MXFP4: exponents floor - 1, floor, floor + 1.
 - HiF4: E6M2 bytes -4..+2 around the reference, and for each the best micro-exponents. The group is 8 x 2 x 4: for given
   S and e8, each four elements choose e16 alone, and each eight choose e8 alone, so the optimum is exact. Because
   2 * S(byte) = S(byte + 4), the 7 x 3 steps of all candidates are only 15 different ones.

The criterion is sum over the group of weight_k (w - q)^2. Error feedback between columns is the solver's business: weights
from the factor's pivots (the cost of an error after feedback) measured the same as diag(H), within 0.02 dB after GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.scheme import Format
from ptq.scheme.format import grouped
from ptq.scheme.hif4 import NAN_SCALE, join_words, scale_values
from ptq.solvers.rtn import check_weight
from ptq.solvers.stats import SolverError

MXFP4_CANDIDATES = (0, 1, -1)
HIF4_CANDIDATES = (0, -1, 1, -2, 2, -3, -4)
"""Offsets from the reference, best first: on equal error the first one wins."""
CHUNK_ELEMENTS = 1 << 18
"""Elements a chunk on a CPU: its temporaries stay in the cache."""
CHUNK_ELEMENTS_CUDA = 1 << 24
WEIGHT_FLOOR = 1e-4
"""Columns weigh at least this fraction of the mean, so that channels never seen in calibration keep sane scales."""


def search_scales(w_nk: Tensor, fmt: Format, *, weights_k: Tensor | None = None) -> Tensor:
    """Best scales for a weight.

    Args:
        w_nk: float [N, K].
        weights_k: importance of an error in each column, float [K], >= 0: diag(H) or the factor's pivots. None: equal.

    Returns:
        Scales [N, K / group] in the format's stored layout.

    Raises:
        SolverError: non-finite weight, weights of another length or negative.
        FormatError: K is not a multiple of the group.
    """
    check_weight(w_nk)
    searches = {"mxfp4": _search_mxfp4, "hif4": _search_hif4}
    if fmt.name not in searches:
        raise SolverError(f"No clipping search is known for {fmt.name}; there is one for {', '.join(searches)}.")
    weights = None if weights_k is None else _weights(weights_k, w_nk)
    chunk = CHUNK_ELEMENTS_CUDA if w_nk.is_cuda else CHUNK_ELEMENTS
    rows = max(1, chunk // w_nk.shape[1])
    parts = [searches[fmt.name](part.float(), fmt, weights) for part in w_nk.split(rows)]
    return torch.cat(parts)


def _weights(weights_k: Tensor, w_nk: Tensor) -> Tensor:
    if tuple(weights_k.shape) != (w_nk.shape[1],) or not bool((weights_k >= 0).all()):
        raise SolverError(
            f"Column weights must be {w_nk.shape[1]} numbers >= 0, found shape {list(weights_k.shape)}, minimum {float(weights_k.min()):g}."
        )
    mean = float(weights_k.double().mean())
    if mean == 0:
        return torch.ones_like(weights_k, dtype=torch.float32)
    return (weights_k / mean).float().clamp(min=WEIGHT_FLOOR)


def _search_mxfp4(w_rk: Tensor, fmt: Format, weights_k: Tensor | None) -> Tensor:
    floor = fmt.quantize(w_rk, scale_rule="floor").scales.to(torch.int32)
    weights = None if weights_k is None else grouped(weights_k, fmt.group_size)
    best_scales, best_error = floor, torch.full(floor.shape, torch.inf, device=w_rk.device)
    for offset in MXFP4_CANDIDATES:
        scales = (floor + offset).clamp(min=0)
        steps = fmt.steps(scales.to(torch.uint8))
        error = grouped(fmt.decode(fmt.encode(w_rk, steps), steps).sub_(w_rk).square_(), fmt.group_size)
        if weights is not None:
            error *= weights
        error_g = error.sum(-1)
        better = error_g < best_error
        best_error = torch.where(better, error_g, best_error)
        best_scales = torch.where(better, scales, best_scales)
    return best_scales.to(torch.uint8)


def _search_hif4(w_rk: Tensor, fmt: Format, weights_k: Tensor | None) -> Tensor:
    byte = fmt.quantize(w_rk).scales & 0xFF  # [R, G]
    errors = _quad_errors(w_rk, byte, weights_k)
    lowest = min(HIF4_CANDIDATES)
    best_error = torch.full(byte.shape, torch.inf, device=byte.device)
    best_offset = torch.zeros_like(byte)
    for offset in HIF4_CANDIDATES:
        by_e8 = _error_by_e8(*(errors[offset - lowest + 4 * shift] for shift in range(3)))
        error = torch.minimum(*by_e8).sum(-1)
        better = (error < best_error) & (byte + offset >= 0) & (byte + offset < NAN_SCALE)
        best_error = torch.where(better, error, best_error)
        best_offset = torch.where(better, offset, best_offset)
    index = (best_offset - lowest).long()[None, :, :, None].expand(1, -1, -1, 16)
    chosen = [errors.gather(0, index + 4 * shift)[0] for shift in range(3)]
    error_e8_0, error_e8_1 = _error_by_e8(*chosen)
    e8 = error_e8_1 < error_e8_0  # [R, G, 8]
    high = e8.repeat_interleave(2, dim=-1)
    e16 = torch.where(high, chosen[2] < chosen[1], chosen[1] < chosen[0])  # [R, G, 16]
    return join_words(byte + best_offset, e8, e16)


def _quad_errors(w_rk: Tensor, byte: Tensor, weights_k: Tensor | None) -> Tensor:
    """Weighted squared error of every four elements under each step S(byte + i) / 4: [15, R, G, 16]."""
    # Elements of a quad in the leading dimension: sums over it run over contiguous memory.
    y = w_rk.abs().reshape(*byte.shape, 16, 4).permute(3, 0, 1, 2).contiguous()
    weights = None if weights_k is None else weights_k.reshape(-1, 16, 4).permute(2, 0, 1).unsqueeze(1).contiguous()
    lowest, highest = min(HIF4_CANDIDATES), max(HIF4_CANDIDATES) + 8
    errors = torch.empty((highest - lowest + 1, *byte.shape, 16), device=w_rk.device)
    for i in range(lowest, highest + 1):
        # Sixteen bytes down is a factor 16 exactly, and keeps the index below the NaN byte.
        step = (scale_values(byte + i - 16) * 4.0).unsqueeze(-1)
        level = (y / step).round_().clamp_(max=7.0)
        error = torch.addcmul(y, level, step, value=-1.0).square_()
        if weights is not None:
            error *= weights
        torch.sum(error, 0, out=errors[i - lowest])
    return errors


def _error_by_e8(shift0: Tensor, shift1: Tensor, shift2: Tensor) -> tuple[Tensor, Tensor]:
    """Errors [R, G, 16] under e8 + e16 = 0, 1, 2 -> errors [R, G, 8] with e8 = 0 and e8 = 1, e16 at its best."""
    low, high = torch.minimum(shift0, shift1), torch.minimum(shift1, shift2)
    return low[..., 0::2] + low[..., 1::2], high[..., 0::2] + high[..., 1::2]
