"""The block-diagonal transform under which quantization costs a layer least, in closed form (WUSH, arXiv 2512.00956).

With x' = T x and W' = W T^-1 in a block, a quantizer with one scale a group adds noise of variance proportional to the
block's energy, to x' and to W' alike. The layer's squared output error is then proportional to
tr(T X T^t) tr(T^-t G T^-1), X = E[x x^t] and G = W^t W. With X^1/2 G X^1/2 = U L U^t, its minimum is (tr L^1/2)^2, at
T = Q L^1/4 U^t X^-1/2 for every orthogonal Q; Q = Hadamard gives every element of a group the same energy, which is what
the noise model assumes. Diagonal X and G give smoothing with alpha = 0.5 followed by the Hadamard rotation: what is won
beyond that comes from correlations between the channels of a block.

Correlations are shrunk towards zero, so few tokens cannot make a direction look empty. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptq.scheme import encode_blocks, hadamard_matrix
from ptq.scheme.learned import ROWS
from ptq.solvers.factor import check_hessian
from ptq.solvers.rtn import check_weight

SHRINKAGE = 0.03
"""Share by which correlations are shrunk. 0.01, 0.03 and 0.1 differ by 0.1 dB of denoiser error on `tiny`."""


def learn_transform(h_kk: Tensor, weights: Sequence[Tensor], size: int) -> Tensor:
    """Blocks of the best transform for one input and the Linears that read it.

    Args:
        h_kk: Hessian float [K, K] of the raw input, positive semidefinite.
        weights: the Linears [N_i, K], each counted at equal total energy.
        size: of a block; divides K.

    Returns:
        uint8 [K/size, size, size] as `ptq.scheme.learned` stores it; x' = x A with A = T^t. Channels with nothing in
        them (no input, or no weight) count as average, uncorrelated ones.

    Raises:
        SolverError: a Hessian or weight that is not finite.
    """
    check_hessian(h_kk)
    for w_nk in weights:
        check_weight(w_nk)
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
