"""Rotation and smoothing change the basis and nothing else."""

import pytest
import torch
from scipy.linalg import hadamard

from ptq.scheme import (
    BLOCK_SIZES,
    hadamard_matrix,
    rotate_hessian,
    rotate_input,
    rotate_weight,
    rotation_scales,
    smooth_hessian,
    smooth_input,
    smooth_weight,
)


def tensors(k=256):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, k, generator=generator, dtype=torch.float64)
    w = torch.randn(30, k, generator=generator, dtype=torch.float64)
    s = (torch.rand(k, generator=generator) * 3 + 0.1).bfloat16()
    return x, w, s


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_matrix_is_sylvester_orthonormal_and_symmetric(size):
    matrix = hadamard_matrix(size).double()
    torch.testing.assert_close(matrix * size**0.5, torch.from_numpy(hadamard(size)).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_factors_are_powers_of_two_with_product_one_over_size(size):
    factors = rotation_scales(size)
    assert factors[0] * factors[1] * size == 1.0
    assert all(torch.frexp(torch.tensor(f)).mantissa == 0.5 for f in factors)


@pytest.mark.parametrize("size", (0, *BLOCK_SIZES))
def test_output_is_invariant_under_rotation(size):
    x, w, _ = tensors()
    torch.testing.assert_close(rotate_input(x, size) @ rotate_weight(w, size).T, x @ w.T, rtol=0, atol=1e-12)
    if size:
        assert not torch.allclose(rotate_input(x, size), x)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_rotation_stays_inside_its_block(size):
    x = torch.zeros(1, 256)
    x[0, size + 3] = 1.0
    rotated = rotate_input(x, size)
    block = torch.zeros(256, dtype=torch.bool)
    block[size : 2 * size] = True
    assert torch.equal(rotated[0] != 0, block)
    assert rotated.abs().max() == rotation_scales(size)[0]


@pytest.mark.parametrize("size", (0, *BLOCK_SIZES))
def test_hessian_of_rotated_inputs(size):
    x, _, _ = tensors()
    rotated = rotate_input(x, size)
    torch.testing.assert_close(rotate_hessian(x.T @ x, size), rotated.T @ rotated, rtol=1e-10, atol=1e-10)


def test_output_is_invariant_under_smoothing():
    x, w, s = tensors()
    torch.testing.assert_close(smooth_input(x, s) @ smooth_weight(w, s).T, x @ w.T, rtol=0, atol=1e-12)
    smoothed = smooth_input(x, s)
    assert torch.equal(smoothed, x * s.double())
    torch.testing.assert_close(smooth_hessian(x.T @ x, s), smoothed.T @ smoothed, rtol=1e-12, atol=1e-10)


def test_smooth_then_rotate_is_invariant():
    x, w, s = tensors()
    y = rotate_input(smooth_input(x, s), 64) @ rotate_weight(smooth_weight(w, s), 64).T
    torch.testing.assert_close(y, x @ w.T, rtol=0, atol=1e-12)


def test_none_and_zero_leave_tensors_unchanged():
    x, w, _ = tensors()
    assert smooth_input(x, None) is x and smooth_weight(w, None) is w and smooth_hessian(x, None) is x
    assert rotate_input(x, 0) is x and rotate_weight(w, 0) is w and rotate_hessian(x, 0) is x


def test_dtype_is_kept_and_smoothing_is_exact_in_float32():
    x, _, s = tensors()
    assert rotate_input(x.float(), 32).dtype == torch.float32
    assert torch.equal(smooth_input(x.float(), s), x.float() * s.float())


@pytest.mark.parametrize("size", [1, 8, 24, 256])
def test_unsupported_block_sizes(size):
    with pytest.raises(ValueError, match=f"size {size} is not supported.*16, 32, 64, 128"):
        rotate_weight(torch.ones(2, 768), size)


def test_blocks_that_do_not_divide_k():
    with pytest.raises(ValueError, match=r"blocks of 128 do not divide .*\[2, 192\]"):
        rotate_input(torch.ones(2, 192), 128)
