"""A layer's input in a basis of learned blocks, changed and rounded on a CPU without anything in between.

In a small model the calls between the two compiled kernels, and what each of them checks, cost more than both. So it is checked
once, and the values are written over the changed input. The same as `Scheme.quantize_input` without this file, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ptq.scheme import native, native_blocks
from ptq.scheme.learned import Learned


def quantized(x: Tensor, blocks_gbb: Tensor, kernels: native.Kernels, group: int) -> Tensor | None:
    """Values of x @ A on the grid of a format.

    Args:
        x: [..., K] in CPU memory, of those that `native.takes`. blocks_gbb: float32 [G, B, B], whole groups each.
        kernels, group: of the format.

    Returns:
        float32 [..., K]; None where x or the blocks are of another kind, or do not fit.
    """
    k, size = x.shape[-1], blocks_gbb.shape[1]
    if x.dtype != torch.float32 or blocks_gbb.dtype != torch.float32 or len(blocks_gbb) * size != k:
        return None
    if not (x.is_contiguous() and blocks_gbb.is_contiguous()) or x.requires_grad or blocks_gbb.requires_grad:
        return None
    rows = x.numel() // k
    if native_blocks.fits(rows, size) and native.is_compiled(native_blocks.multiply, x.dtype):
        out = torch.empty_like(x)
        changed = out.numpy().reshape(rows, k)
        native_blocks.multiply(x.numpy().reshape(rows, k), blocks_gbb.numpy(), changed)
    else:
        out = Learned(size).input(x, blocks_gbb)
        changed = out.numpy()
    native.round_rows(kernels, changed.reshape(-1, group).view(np.uint32))
    return out
