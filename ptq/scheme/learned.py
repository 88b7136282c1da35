"""Learned block-diagonal transform along the last dimension: stored matrices instead of a rule.

A is block-diagonal with blocks [B, B]: x' = x A online, W' = W A^-T offline, so that W' x' = W x for any invertible A.

The blocks are those under which quantization costs the layer least, in closed form (WUSH, arXiv 2512.00956). With x' = T x
and W' = W T^-1 in a block, a quantizer with one scale a group adds noise of variance proportional to the block's energy, to
x' and to W' alike. The layer's squared output error is then proportional to tr(T X T^t) tr(T^-t G T^-1), X = E[x x^t] and
G = W^t W. With X^1/2 G X^1/2 = U L U^t, its minimum is (tr L^1/2)^2, at T = Q L^1/4 U^t X^-1/2 for every orthogonal Q;
Q = Hadamard gives every element of a group the same energy, which is what the noise model assumes. Diagonal X and G give
smoothing with alpha = 0.5 followed by the Hadamard rotation: what is won beyond that comes from correlations between the
channels of a block. Correlations are shrunk towards zero, so few tokens cannot make a direction look empty. All in float64.

Blocks are stored as the bits of float8 e4m3 in uint8 (integers, because the diffusers loader casts floating dtypes).
Three mantissa bits are enough: W' is made with the inverse of the matrix as stored, so coarse entries only move A a little
away from its optimum and cost no exactness. Measured on `tiny`: the denoiser error with e4m3 blocks is within 2 % of that
with bfloat16 blocks, at half the bytes (3.8 % of an A14B block's packed weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ptq.known import TRANSFORMS
from ptq.scheme.hadamard import hadamard_matrix
from ptq.scheme.smoothing import smoothing_candidates
from ptq.scheme.transform import OFF, Blocked, register_transform, settle

LEARNED = "learned"
LARGEST = 256.0
"""Magnitude of a block's largest entry as stored; decoded it is 1. e4m3 then holds entries down to 2^-17 of it."""
ROWS = 1024
"""Rows of a weight transformed at a time: float64 copies of a few rows, not of all."""
SHRINKAGE = 0.03
"""Share by which correlations are shrunk. 0.01, 0.03 and 0.1 differ by 0.1 dB of denoiser error on `tiny`."""


@register_transform
class Learned(Blocked):
    """Blocks uint8 [K/B, B, B], chosen for each input; the Hadamard matrix alone, and behind smoothing, are candidates."""

    kind = LEARNED
    title = "Learned block transform"
    tensor = "transform"
    needs_records = True
    needs_hessian = True
    smooths = TRANSFORMS[LEARNED].smooths
    decodes = True
    makes_tensor = True
    kernel = "blocks"
    description = "Input and weight change their basis in blocks of {block} channels, by the matrix for which quantization noise costs the layer least, in closed form from the second moments of input and weight (WUSH, arXiv 2512.00956); its last factor is a Hadamard matrix, which spreads outliers. Blocks are stored with 8 bits an entry and applied to the input at run time. Tried for each input beside the Hadamard matrix alone (off)."

    def check(self, group_size: int) -> None:
        TRANSFORMS[LEARNED].check(self.block, group_size)

    def stored(self, k: int) -> tuple[tuple[int, ...], torch.dtype]:
        size = self.block_of(k)
        return (k // size, size, size), torch.uint8

    def decode(self, basis: Tensor) -> Tensor:
        return decode_blocks(basis)

    def input(self, x: Tensor, basis: Tensor | None) -> Tensor:
        blocks = _decoded(basis, x.dtype)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            from ptq.scheme import native_blocks

            if native_blocks.takes(x, blocks):
                return native_blocks.change(x, blocks)
        return transform_input(x, blocks)

    def weight(self, w_nk: Tensor, basis: Tensor | None) -> Tensor:
        return transform_weight(w_nk, _decoded(basis, torch.float32))

    def restore(self, w_nk: Tensor, basis: Tensor | None) -> Tensor:
        return transform_input(w_nk, _decoded(basis, torch.float32).transpose(-2, -1))

    def hessian(self, h_kk: Tensor, basis: Tensor | None) -> Tensor:
        return settle(transform_hessian(h_kk, _decoded(basis, torch.float32)))

    def candidates(
        self, weights: Sequence[Tensor], h_kk: Tensor | None, rms_k: Tensor, exponents: Sequence[float]
    ) -> Mapping[str, Tensor | None]:
        assert h_kk is not None
        k, size, device = len(rms_k), self.block_of(len(rms_k)), h_kk.device
        smoothed = smoothing_candidates(weights, rms_k, exponents)
        blocks = {OFF: self.plain(k)} | {name: hadamard_blocks(k, size, s) for name, s in smoothed.items()}
        return {name: stored.to(device) for name, stored in blocks.items()} | {
            LEARNED: learn_blocks(h_kk, weights, size)
        }

    def plain(self, k: int, device: torch.device | None = None) -> Tensor:
        return hadamard_blocks(k, self.block_of(k)).to(device)


def _decoded(basis: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Blocks to compute with: decoded ones are taken as they are."""
    assert basis is not None
    return decode_blocks(basis, dtype) if basis.dtype == torch.uint8 else basis


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
    return torch.cat([transform_input(rows, inverse).float() for rows in w_nk.split(ROWS)])


def transform_hessian(h_kk: Tensor, blocks_gbb: Tensor) -> Tensor:
    """Hessian [K, K] = sum x x^T of raw inputs -> A^T H A, in the dtype of `h_kk`."""
    size, changed = blocks_gbb.shape[1], torch.empty_like(h_kk)
    blocks = blocks_gbb.to(h_kk.dtype)
    # Some rows at a time: a wide Hessian is held twice, not four times.
    for rows, out, part in zip(h_kk.split(ROWS), changed.split(ROWS), blocks.split(ROWS // size), strict=True):
        left = part.transpose(-2, -1) @ rows.reshape(len(part), size, -1)
        out.copy_(transform_input(left.reshape(rows.shape), blocks))
    return changed


def learn_blocks(h_kk: Tensor, weights: Sequence[Tensor], size: int) -> Tensor:
    """Blocks of the best transform for one input and the Linears that read it.

    Args:
        h_kk: Hessian float [K, K] of the raw input, positive semidefinite, finite.
        weights: the Linears [N_i, K], finite, each counted at equal total energy.
        size: of a block; divides K.

    Returns:
        uint8 [K/size, size, size] as stored; x' = x A with A = T^t. Channels with nothing in them (no input, or no weight)
        count as average, uncorrelated ones.
    """
    x_gbb = _diagonal_blocks(h_kk, size)
    g_gbb = torch.zeros_like(x_gbb)
    for w_nk in weights:
        gram = sum(_gram(rows, size) for rows in w_nk.split(ROWS))
        g_gbb += gram / gram.diagonal(dim1=-2, dim2=-1).sum().clamp(min=1e-300)
    x_size, x_gbb = _correlations(x_gbb)
    g_size, g_gbb = _correlations(g_gbb)
    # In channels scaled by s both sides have the same sizes, `balanced`; there the problem is well conditioned.
    s, balanced = (g_size / x_size).sqrt(), (g_size * x_size).sqrt()
    outer = balanced.unsqueeze(-1) * balanced.unsqueeze(-2)
    root, inverse_root = _roots(x_gbb * outer)
    energy, u = torch.linalg.eigh(root @ (g_gbb * outer) @ root)
    equalized = energy.clamp(min=0.0).pow(0.25).unsqueeze(-1) * u.transpose(-2, -1)
    t = hadamard_matrix(size).to(u) @ equalized @ inverse_root
    return encode_blocks(t.transpose(-2, -1) * s.unsqueeze(-1))


def _gram(w_nk: Tensor, size: int) -> Tensor:
    """W^T W of each block of columns, float64 [K/size, size, size]."""
    columns = w_nk.double().reshape(len(w_nk), -1, size).transpose(0, 1)
    return columns.transpose(-2, -1) @ columns


def _diagonal_blocks(h_kk: Tensor, size: int) -> Tensor:
    """[K, K] -> float64 [K/size, size, size]."""
    blocks = h_kk.reshape(len(h_kk) // size, size, -1, size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()


def _correlations(blocks_gbb: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments [G, B, B] -> (size of each channel [G, B], shrunk correlations [G, B, B])."""
    energy = blocks_gbb.diagonal(dim1=-2, dim2=-1)
    used = energy > 0
    size = torch.where(used, energy, energy.sum() / used.sum().clamp(min=1)).sqrt()
    size = torch.where(size > 0, size, 1.0)
    correlations = blocks_gbb / (size.unsqueeze(-1) * size.unsqueeze(-2)) * (1 - SHRINKAGE)
    correlations.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return size, correlations


def _roots(m_gbb: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse of positive definite matrices [G, B, B]."""
    energy, v = torch.linalg.eigh(m_gbb)
    floor = 1e-12 * energy[..., -1:]  # rounding; shrinkage keeps true eigenvalues far above
    root = energy.clamp(min=floor).sqrt().unsqueeze(-2)
    return (v * root) @ v.transpose(-2, -1), (v / root) @ v.transpose(-2, -1)
