"""Learned block-diagonal transform along the last dimension: stored matrices instead of a rule.

A is block-diagonal with blocks [B, B]: x' = x A online, W' = W A^-T offline, so that W' x' = W x for any invertible A.
Choosing the blocks is a solver's business (`ptq.solvers.learned`); smoothing and rotation are special cases.

Blocks are stored as the bits of float8 e4m3 in uint8 (integers, because the diffusers loader casts floating dtypes).
Three mantissa bits are enough: W' is made with the inverse of the matrix as stored, so coarse entries only move A a little
away from its optimum and cost no exactness. Measured on `tiny`: the denoiser error with e4m3 blocks is within 1 % of that
with bfloat16 blocks, at half the bytes (1.9 % of an A14B block's packed weights).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.scheme.hadamard import hadamard_matrix

LARGEST = 256.0
"""Magnitude of a block's largest entry as stored; decoded it is 1. e4m3 then holds entries down to 2^-17 of it."""
ROWS = 1024
"""Rows of a weight transformed at a time: float64 copies of a few rows, not of all."""


def encode_blocks(blocks_gbb: Tensor) -> Tensor:
    """float [G, B, B] -> uint8 [G, B, B], each block scaled so that its largest entry is 1.

    The scale of a block is free: the weight takes the inverse.
    """
    scaled = blocks_gbb.double() / blocks_gbb.abs().amax((-2, -1), keepdim=True).double() * LARGEST
    return scaled.float().to(torch.float8_e4m3fn).view(torch.uint8)


def decode_blocks(stored_gbb: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [G, B, B] -> float [G, B, B], exact in float32 and bfloat16; the largest entry of a block is 1."""
    return (stored_gbb.view(torch.float8_e4m3fn).float() / LARGEST).to(dtype)


def hadamard_blocks(k: int, size: int, smooth_k: Tensor | None = None) -> Tensor:
    """Smoothing by float [K] (None: none) and block Hadamard rotation as stored blocks, uint8 [K/size, size, size]."""
    rotation = hadamard_matrix(size)
    if smooth_k is None:
        return encode_blocks(rotation.expand(k // size, -1, -1))
    return encode_blocks(smooth_k.float().reshape(-1, size, 1) * rotation.to(smooth_k.device))


def transform_input(x: Tensor, blocks_gbb: Tensor) -> Tensor:
    """x [..., K] @ A in the dtype of `blocks_gbb`, float [G, B, B] with G * B = K."""
    groups, size = blocks_gbb.shape[:2]
    columns = x.to(blocks_gbb.dtype).reshape(-1, groups, size).transpose(0, 1)
    return torch.bmm(columns, blocks_gbb).transpose(0, 1).reshape(x.shape)


def transform_weight(w_nk: Tensor, blocks_gbb: Tensor) -> Tensor:
    """W [N, K] A^-T in float64, rounded to float32, so that transform_weight(W) @ transform_input(x) = W @ x."""
    inverse = torch.linalg.inv(blocks_gbb.double()).transpose(-2, -1)
    parts = [transform_input(rows, inverse).float() for rows in w_nk.split(ROWS)]
    return torch.cat(parts)


def restore_weight(w_nk: Tensor, blocks_gbb: Tensor) -> Tensor:
    """The inverse of `transform_weight`: W' [N, K] A^T, in the dtype of the blocks."""
    return transform_input(w_nk, blocks_gbb.transpose(-2, -1))


def transform_hessian(h_kk: Tensor, blocks_gbb: Tensor) -> Tensor:
    """Hessian [K, K] = sum x x^T of raw inputs -> A^T H A, in the dtype of `h_kk`."""
    size, changed = blocks_gbb.shape[1], h_kk.clone()
    columns = [slice(start, start + size) for start in range(0, len(h_kk), size)]
    blocks = blocks_gbb.to(h_kk.dtype)
    for part, block in zip(
        columns, blocks, strict=True
    ):  # block by block: a wide Hessian is held twice, not four times
        changed[:, part] = changed[:, part] @ block
    for part, block in zip(columns, blocks, strict=True):
        changed[part] = block.T @ changed[part]
    return changed
