"""Block Hadamard rotation along the last dimension (Sylvester recurrence, no stored tables).

With B the orthonormal block-diagonal Hadamard matrix, (x B)(w B)^T = x w^T: rotating input and weight leaves the
layer's output unchanged and spreads an outlier over its block. B = H / sqrt(n) is symmetric. For n = 32 and 128 sqrt(n)
is not a power of two, so the factor is split: the input uses H / 2^floor(log2(n)/2), the weight H / 2^ceil(log2(n)/2).
The product is still H H / n = 1, every factor is exact in floating point, and a kernel that adds and subtracts in the
same order reproduces the bits. Block formats have power-of-two scales at heart, so the factor sqrt(2) costs nothing.

Global rotations are deliberately absent: they hurt MXFP4, whose scales are powers of two (Shao et al., "Block Rotation is All You
Need for MXFP4 Quantization").
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ptq.known import BLOCK_SIZES, TRANSFORMS
from ptq.scheme.transform import Blocked, register_transform, settle


@register_transform
class Hadamard(Blocked):
    """A rule, not stored matrices: nothing is kept with the layer."""

    kind = "hadamard"
    title = "Block Hadamard rotation"
    kernel = "hadamard"
    description = "Input and weight are rotated by an orthonormal Hadamard matrix in blocks of {block} channels: the layer's output stays the same, an outlier is spread over its block. The weight is rotated once, the input at run time."

    def check(self, group_size: int) -> None:
        TRANSFORMS["hadamard"].check(self.block, group_size)

    def input(self, x: Tensor, basis: Tensor | None) -> Tensor:
        size = self.block_of(x.shape[-1])
        return rotate(x, size, rotation_factors(size)[0])

    def weight(self, w_nk: Tensor, basis: Tensor | None) -> Tensor:
        size = self.block_of(w_nk.shape[1])
        return rotate(w_nk.float(), size, rotation_factors(size)[1])

    def restore(self, w_nk: Tensor, basis: Tensor | None) -> Tensor:
        size = self.block_of(w_nk.shape[1])
        input_factor, weight_factor = rotation_factors(size)
        return rotate(w_nk, size, weight_factor) * (input_factor / weight_factor)

    def hessian(self, h_kk: Tensor, basis: Tensor | None) -> Tensor:
        size = self.block_of(len(h_kk))
        factor = rotation_factors(size)[0]
        return settle(rotate(rotate(h_kk, size, factor).T, size, factor).T)


def rotation_factors(size: int) -> tuple[float, float]:
    """(input factor, weight factor): powers of two whose product is 1 / size."""
    exponent = size.bit_length() - 1
    return 2.0 ** -(exponent // 2), 2.0 ** -((exponent + 1) // 2)


def hadamard_matrix(size: int) -> Tensor:
    """The orthonormal Sylvester Hadamard matrix, float32 [size, size], symmetric and its own inverse.

    Raises:
        ValueError: `size` is not one of BLOCK_SIZES.
    """
    return _scaled_signs(size, 1.0, torch.device("cpu"), torch.float32) / size**0.5


def signs(size: int) -> Tensor:
    """The +-1 Sylvester matrix, float32 [size, size]."""
    if size not in BLOCK_SIZES:
        raise ValueError(f"Hadamard block size {size} is not supported; choose one of {BLOCK_SIZES}.")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def rotate(x: Tensor, size: int, factor: float) -> Tensor:
    """x [..., K] times the block-diagonal +-1 matrix times `factor`, in the dtype of x."""
    if x.shape[-1] % size:
        raise ValueError(f"Rotation blocks of {size} do not divide the last dimension of {list(x.shape)}.")
    matrix = _scaled_signs(size, factor, x.device, x.dtype)
    return (x.reshape(*x.shape[:-1], x.shape[-1] // size, size) @ matrix).reshape(x.shape)


@functools.lru_cache(maxsize=32)
def _scaled_signs(size: int, factor: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the matrix outlives the caller's mode
        return (signs(size) * factor).to(device=device, dtype=dtype)
