"""Residual blocks: blocks of 64 input channels whose values get a second 4-bit word.

Of an input x' in the basis, the residual x' - Q(x') of some blocks is quantized in the same format by the same rule and stands
behind the K channels as further ones; the weight's columns of these blocks stand there once more. So the product is
W Q(x') + W_chosen Q(x' - Q(x')), still of 4-bit numbers alone, and the noise of a chosen block falls to that of its residual.
Which blocks are chosen: `ptq.solvers.residual`. All tensors along the last dimension.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq.errors import FormatError
from ptq.known import RESIDUAL_BLOCK


def count_blocks(k: int) -> int:
    """How many whole blocks K channels have; channels behind them get no residual."""
    return k // RESIDUAL_BLOCK


def check_blocks(blocks: Sequence[int], k: int) -> None:
    """Raise FormatError unless these are blocks of K channels, ascending, each once."""
    if any(later <= earlier for earlier, later in itertools.pairwise(blocks)):
        raise FormatError(
            f"Residual blocks are listed in ascending order, each once; found {list(blocks)[:20]}. Quantize the model again."
        )
    if blocks and not 0 <= blocks[0] <= blocks[-1] < count_blocks(k):
        raise FormatError(
            f"Residual blocks of {k} channels have the numbers 0 to {count_blocks(k) - 1}; found {list(blocks)[:20]}, which are of a layer of another width. Quantize the model again."
        )


def columns(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """The channels of these blocks, [..., K] -> [..., 64 R]."""
    whole = x[..., : count_blocks(x.shape[-1]) * RESIDUAL_BLOCK].unflatten(-1, (-1, RESIDUAL_BLOCK))
    return whole[..., list(blocks), :].flatten(-2)


def repeated(stored: Tensor, blocks: Sequence[int], k: int) -> Tensor:
    """What is stored of these blocks, of codes or scales [..., K / n] of K channels -> [..., 64 R / n]."""
    size = RESIDUAL_BLOCK * stored.shape[-1] // k
    return torch.cat([stored[..., block * size : (block + 1) * size] for block in blocks], -1)


def to_flags(blocks: Sequence[int], k: int) -> Tensor:
    """Blocks of K channels -> bool [K / 64] on the CPU: of one shape for all layers of a width, whatever their blocks."""
    flags = torch.zeros(count_blocks(k), dtype=torch.bool, device="cpu")
    flags[list(blocks)] = True
    return flags


def from_flags(flags: Tensor | None) -> tuple[int, ...]:
    """The inverse of `to_flags`; none where there are no flags."""
    return () if flags is None else _numbers(flags.numpy().tobytes())


@functools.lru_cache(maxsize=4096)
def _numbers(flags: bytes) -> tuple[int, ...]:
    return tuple(number for number, flag in enumerate(flags) if flag)
