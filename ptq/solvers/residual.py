"""Which input blocks get a residual: those whose quantization noise costs the outputs most, for what they cost themselves.

Measured, not modelled: the noise x' - Q(x') of the sample tokens, through the quantized weight's columns of the block, relative
to each Linear's output, times what such an error does behind the Linears. Noise of two blocks is as good as independent, so what a residual takes away adds up, and blocks are
taken in the order of gain over cost until the budget is spent.

The weight's codes do not depend on the choice: GPTQ's Hessian is of inputs that are not quantized.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ptq.scheme import Scheme
from ptq.scheme.residual import RESIDUAL_BLOCK, columns, count_blocks

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class BlockGains:
    """What residuals of the blocks of one input would be worth.

    Attributes:
        gains: of each block, the squared output error that its residual takes away, relative to the output, summed over the
            Linears that read the input.
        rows: output features of these Linears together; a block costs 64 products for each.
        sensitivity: error of what is behind these Linears for each unit of theirs; compares inputs.
    """

    gains: tuple[float, ...]
    rows: int
    sensitivity: float = 1.0


def block_gains(
    x_tk: Tensor, xq_tk: Tensor, values: Sequence[Tensor], signals: Sequence[float], rows: int, scheme: Scheme
) -> BlockGains:
    """Measure every block of one input.

    Args:
        x_tk, xq_tk: sample tokens in the basis and the same quantized, float32 [T, K].
        values: of the quantized weights [N_i, K] that read it, in the basis; rows of them that stand for all.
        signals: squared output of each over the sample tokens and these rows; one without any output has no say.
        rows: of all these weights together.
    """
    gains = []
    for block in range(count_blocks(x_tk.shape[1])):
        gram = torch.zeros(RESIDUAL_BLOCK, RESIDUAL_BLOCK, device=x_tk.device)
        for w_nk, signal in zip(values, signals, strict=True):
            w_nb = columns(w_nk, (block,))
            gram += w_nb.T @ w_nb / signal if signal > 0 else 0.0
        noise = columns(x_tk, (block,)) - columns(xq_tk, (block,))
        left = noise - scheme.format.fake_quantize(noise, scale_rule=scheme.input_rule)
        before, after = (float((one @ gram * one).sum(dtype=torch.float64)) for one in (noise, left))
        gains.append(max(before - after, 0.0))
    return BlockGains(tuple(gains), rows)


def choose_blocks(inputs: Mapping[Key, BlockGains], budget: float) -> dict[Key, tuple[int, ...]]:
    """Input -> its residual blocks, ascending.

    Args:
        budget: products a token that all residuals may take.
    """
    ranked = sorted(
        (
            (one.sensitivity * gain / one.rows, name, block)
            for name, one in inputs.items()
            for block, gain in enumerate(one.gains)
        ),
        key=lambda entry: -entry[0],
    )
    chosen: dict[Key, list[int]] = {name: [] for name in inputs}
    for worth, name, block in ranked:
        cost = RESIDUAL_BLOCK * inputs[name].rows
        if worth > 0 and cost <= budget:
            budget -= cost
            chosen[name].append(block)
    return {name: tuple(sorted(blocks)) for name, blocks in chosen.items()}
