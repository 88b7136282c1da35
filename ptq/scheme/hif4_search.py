"""The search of a weight's HiF4 scales: the E6M2 byte and the micro-exponents of each group with the smallest weighted squared error.

By tensor operations, which are the definition, and by a compiled kernel for tensors in CPU memory, which makes the same choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.scheme import native
from ptq.scheme.format import NAN_SCALE
from ptq.scheme.hif4_words import BINADE, join_words, scale_values

SEARCHED_OFFSETS = (0, -1, 1, -2, 2, -3, -4)
"""E6M2 bytes tried for a weight's group, relative to the reference, best first: on equal error the first one wins."""
P2_OFFSETS = (0, BINADE, -BINADE)
"""The same under the rule `p2`, relative to its own byte."""
RUNGS = 5
"""Steps of a weight's search that are tried by one operation."""


def searched_words(w_rk: Tensor, byte: Tensor, weights_k: Tensor | None, p2: bool) -> Tensor:
    """Scale words int32 [R, G] of a weight float32 [R, K].

    Args:
        byte: int32 [R, G], of the format's own conversion.
        weights_k: importance of an error in each column, float32 [K]; None: equal.
        p2: whether S stays without a mantissa.
    """
    # Rungs are the bytes whose steps the candidates use, S and its doubles: under `p2` every fourth one.
    offsets, spacing = (P2_OFFSETS, BINADE) if p2 else (SEARCHED_OFFSETS, 1)
    search = searched_natively if native.takes(w_rk) else searched
    return search(w_rk, byte, weights_k, offsets, spacing)


def searched(w_rk: Tensor, byte: Tensor, weights_k: Tensor | None, offsets: tuple[int, ...], spacing: int) -> Tensor:
    """The scale words [R, G] of the smallest weighted squared error, among bytes `byte` + offset and all micro-exponents.

    The group is 8 x 2 x 4: for given S and e8 each four elements choose e16 alone, and each eight choose e8 alone, so the optimum
    is exact. Because 2 * S(byte) = S(byte + 4), candidates share steps: 7 x 3 are only 15 different ones.
    """
    lowest, double = min(offsets), BINADE // spacing
    errors = _quad_errors(w_rk, byte, weights_k, _rungs(offsets, spacing))
    count = len(offsets)  # they are neighbours: candidates and their doubles are slices of the rungs
    by_e8 = _error_by_e8(*(errors[double * shift : double * shift + count] for shift in range(3)))
    error = torch.minimum(*by_e8).sum(-1)  # [offsets, R, G], ascending
    tried = torch.tensor(offsets, device=byte.device, dtype=byte.dtype)
    scales = byte + tried[:, None, None]
    error = error[(tried - lowest) // spacing].masked_fill_((scales < 0) | (scales >= NAN_SCALE), torch.inf)
    best_offset = tried[error.argmin(0)]
    index = ((best_offset - lowest) // spacing).long()[None, :, :, None].expand(1, -1, -1, 16)
    chosen = [errors.gather(0, index + double * shift)[0] for shift in range(3)]
    error_e8_0, error_e8_1 = _error_by_e8(*chosen)
    e8 = error_e8_1 < error_e8_0  # [R, G, 8]
    high = e8.repeat_interleave(2, dim=-1)
    e16 = torch.where(high, chosen[2] < chosen[1], chosen[1] < chosen[0])  # [R, G, 16]
    return join_words(byte + best_offset, e8, e16)


def searched_natively(
    w_rk: Tensor, byte: Tensor, weights_k: Tensor | None, offsets: tuple[int, ...], spacing: int
) -> Tensor:
    """`searched` by a compiled kernel, which needs no temporaries of the errors."""
    import numpy as np

    from ptq.scheme.native_hif4_search import search

    steps = _steps(byte.flatten(), _rungs(offsets, spacing)).T.contiguous().numpy()
    weights = torch.ones(w_rk.shape[1]) if weights_k is None else weights_k
    w, first, columns = (x.contiguous().numpy() for x in (w_rk.detach(), byte, weights.detach()))
    groups, bytes_n, words = w.reshape(-1, 64), first.reshape(-1), np.empty(first.size, np.int32)
    table, tried = columns.reshape(-1, 64), np.array(offsets, np.int32)

    def run(part: slice) -> None:
        search(groups[part], part.start, bytes_n[part], steps[part], table, min(offsets), spacing, tried, words[part])

    native.in_parts(search, w.dtype, len(groups), native.PART_ELEMENTS // 64, run)
    return torch.from_numpy(words).view(byte.shape)


def _rungs(offsets: tuple[int, ...], spacing: int) -> range:
    """Bytes, relative to a group's own, whose steps the candidates use."""
    return range(min(offsets), max(offsets) + 2 * BINADE + 1, spacing)


def _steps(byte: Tensor, rungs: range) -> Tensor:
    """S(byte + rung) / 4 as float32 [rungs, ...]. Sixteen bytes down is a factor 16 exactly, and keeps the index below the NaN byte."""
    below = torch.tensor([rung - 16 for rung in rungs], device=byte.device, dtype=byte.dtype)
    return scale_values(byte + below.view(-1, *[1] * byte.dim())) * 4.0


def _quad_errors(w_rk: Tensor, byte: Tensor, weights_k: Tensor | None, offsets: range) -> Tensor:
    """Weighted squared error of every four elements under each step S(byte + offset) / 4: [offsets, R, G, 16]."""
    # Elements of a quad in the leading dimension: sums over it run over contiguous memory.
    y = w_rk.abs().reshape(*byte.shape, 16, 4).permute(3, 0, 1, 2).contiguous()
    weights = None if weights_k is None else weights_k.reshape(-1, 16, 4).permute(2, 0, 1).unsqueeze(1).contiguous()
    errors = torch.empty((len(offsets), *byte.shape, 16), device=w_rk.device)
    steps = _steps(byte, offsets)[:, None, :, :, None]
    for step, out in zip(steps.split(RUNGS), errors.split(RUNGS), strict=True):
        level = (y / step).round_().clamp_(max=7.0)
        error = torch.addcmul(y, level, step, value=-1.0).square_()
        if weights is not None:
            error *= weights
        torch.sum(error, 1, out=out)
    return errors


def _error_by_e8(shift0: Tensor, shift1: Tensor, shift2: Tensor) -> tuple[Tensor, Tensor]:
    """Errors [R, G, 16] under e8 + e16 = 0, 1, 2 -> errors [R, G, 8] with e8 = 0 and e8 = 1, e16 at its best."""
    low, high = torch.minimum(shift0, shift1), torch.minimum(shift1, shift2)
    return low[..., 0::2] + low[..., 1::2], high[..., 0::2] + high[..., 1::2]
