"""A transform changes the basis and nothing else, whatever its kind."""

import pytest
import torch
from scipy.linalg import hadamard

from ptq.scheme import FormatError, Hadamard, Learned, Scheme, Smoothed, get_format
from ptq.scheme.hadamard import BLOCK_SIZES, hadamard_matrix, rotate, rotation_factors
from ptq.scheme.learned import encode_blocks
from ptq.scheme.transform import UNCHANGED, settle

K = 256


def tensors(k=K):
    """x and w are eighths up to 4: sums of a block of them times a power of two are exact in float32."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-32, 33, (n, k), generator=generator).double() / 8 for n in (50, 30))
    s = (torch.rand(k, generator=generator) * 3 + 0.1).bfloat16()
    return x, w, s


def learned_basis(size):
    generator = torch.Generator().manual_seed(1)
    return encode_blocks(torch.randn(K // size, size, size, generator=generator) + 1.5 * size**0.5 * torch.eye(size))


EVERY = {
    "none": (UNCHANGED, None),
    **{f"hadamard {size}": (Hadamard(size), None) for size in BLOCK_SIZES},
    "smoothed 0": (Smoothed(0), tensors()[2]),
    "smoothed 64": (Smoothed(64), tensors()[2]),
    "learned 32": (Learned(32), learned_basis(32)),
    "learned 64": (Learned(64), learned_basis(64)),
    "learned 128": (Learned(128), learned_basis(128)),
}
every = pytest.mark.parametrize(("transform", "basis"), EVERY.values(), ids=EVERY)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_matrix_is_sylvester_orthonormal_and_symmetric(size):
    matrix = hadamard_matrix(size).double()
    torch.testing.assert_close(matrix * size**0.5, torch.from_numpy(hadamard(size)).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_factors_are_powers_of_two_with_product_one_over_size(size):
    factors = rotation_factors(size)
    assert factors[0] * factors[1] * size == 1.0
    assert all(torch.frexp(torch.tensor(f)).mantissa == 0.5 for f in factors)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_output_is_invariant_under_rotation(size):
    x, w, _ = tensors()
    transform = Hadamard(size)
    rotated, weight = transform.input(x, None), transform.weight(w, None)
    assert weight.dtype == torch.float32
    assert torch.equal(rotated @ weight.double().T, x @ w.T)  # every step is exact
    assert not torch.allclose(rotated, x)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_rotation_stays_inside_its_block(size):
    x = torch.zeros(1, 256)
    x[0, size + 3] = 1.0
    rotated = Hadamard(size).input(x, None)
    block = torch.zeros(256, dtype=torch.bool)
    block[size : 2 * size] = True
    assert torch.equal(rotated[0] != 0, block)
    assert rotated.abs().max() == rotation_factors(size)[0]


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_hessian_of_rotated_inputs(size):
    x, _, _ = tensors()
    transform = Hadamard(size)
    rotated = transform.input(x, None)
    torch.testing.assert_close(transform.hessian(x.T @ x, None), rotated.T @ rotated, rtol=1e-10, atol=1e-10)


def test_output_is_invariant_under_smoothing():
    x, w, s = tensors()
    transform = Smoothed(0)
    smoothed, weight = transform.input(x, s), transform.weight(w, s)
    assert torch.equal(smoothed, x * s.double()) and torch.equal(weight, w.float() / s.float())
    # Each element of the weight is rounded once to float32.
    bound = 2.0**-24 * (x.abs() @ w.abs().T)
    assert ((smoothed @ weight.double().T - x @ w.T).abs() <= bound + 1e-12).all()
    torch.testing.assert_close(transform.hessian(x.T @ x, s), smoothed.T @ smoothed, rtol=1e-12, atol=1e-10)


def test_smoothing_comes_before_the_rotation():
    x, w, s = tensors()
    transform, smooth, rotate = Smoothed(64), Smoothed(0), Hadamard(64)
    h = x.T @ x
    assert torch.equal(transform.input(x, s), rotate.input(smooth.input(x, s), None))
    assert torch.equal(transform.weight(w, s), rotate.weight(smooth.weight(w, s), None))
    assert torch.equal(transform.hessian(h, s), rotate.hessian(smooth.hessian(h, s), None))


@every
def test_every_transform_keeps_the_output_and_can_be_undone(transform, basis):
    x, w, _ = tensors()
    changed, weight = transform.input(x.float(), basis), transform.weight(w, basis)
    assert weight.dtype == torch.float32
    y = x @ w.T
    torch.testing.assert_close(changed.double() @ weight.double().T, y, rtol=0, atol=2e-5 * float(y.abs().max()))
    restored = transform.restore(weight, basis)
    assert restored.dtype == torch.float32
    torch.testing.assert_close(restored.double(), w, rtol=0, atol=2e-5)
    h = transform.hessian(x.T @ x, basis)
    assert h.dtype == torch.float64
    changed = changed.double()
    torch.testing.assert_close(h, changed.T @ changed, rtol=1e-5, atol=1e-5 * float(h.diagonal().max()))


@every
def test_every_transform_mixes_whole_blocks_and_no_others(transform, basis):
    x = torch.zeros(1, K)
    x[0, 131] = 1.0
    start = 131 // transform.block * transform.block if transform.block else 131
    touched = transform.input(x, basis)[0].nonzero().flatten()
    assert touched.min() >= start and touched.max() < start + max(transform.block, 1)
    assert len(touched) > transform.block / 2


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_transform_keeps_the_dtype_and_shape_of_an_input(transform, basis, dtype):
    x = tensors()[0].to(dtype).reshape(5, 2, 5, K)
    changed = transform.input(x, basis)
    assert changed.dtype == dtype and changed.shape == x.shape
    assert torch.equal(changed.reshape(50, K), transform.input(x.reshape(50, K), basis))


@every
def test_a_basis_is_stored_as_the_transform_says(transform, basis):
    if basis is None:
        assert transform.stored(K) is None and transform.tensor is None and transform.plain(K) is None
        return
    assert transform.stored(K) == (tuple(basis.shape), basis.dtype) and transform.tensor
    plain = transform.plain(K)
    assert (tuple(plain.shape), plain.dtype) == transform.stored(K)
    # What nothing was chosen for is the block Hadamard rotation alone, up to a factor that the weight takes back.
    x = tensors()[0].float()
    changed = transform.input(x, plain)
    expected = Hadamard(transform.block).input(x, None) if transform.block else x
    torch.testing.assert_close(changed / changed.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-6)


@every
def test_a_decoded_basis_stands_for_the_stored_one(transform, basis):
    if basis is None or not transform.decodes:
        assert basis is None or transform.decode(basis) is basis
        return
    decoded, (x, w, _) = transform.decode(basis), tensors()
    x = x.float()
    assert torch.equal(transform.input(x, decoded), transform.input(x, basis))
    assert torch.equal(transform.weight(w, decoded), transform.weight(w, basis))
    assert torch.equal(transform.restore(w.float(), decoded), transform.restore(w.float(), basis))
    assert torch.equal(transform.hessian(x.T @ x, decoded), transform.hessian(x.T @ x, basis))


def test_no_transform_leaves_tensors_unchanged():
    x, w, _ = tensors()
    none, w32 = UNCHANGED, w.float()
    assert none.input(x, None) is x and none.hessian(x, None) is x and none.restore(x, None) is x
    assert none.weight(w32, None) is w32 and torch.equal(none.weight(w, None), w32)


def test_smoothing_is_exact_in_float32():
    x, _, s = tensors()
    assert torch.equal(Smoothed(0).input(x.float(), s), x.float() * s.float())


@pytest.mark.parametrize("size", [0, 1, 8, 24, 256])
def test_unsupported_block_sizes(size):
    with pytest.raises(FormatError, match=f"size {size} is not supported.*16, 32, 64, 128"):
        Hadamard(size).check(32)
    if size:
        with pytest.raises(FormatError, match=f"size {size} is not supported.*16, 32, 64, 128"):
            Smoothed(size).check(32)
    with pytest.raises(
        FormatError, match=rf"of \(16, 32, 64, 128\) channels .*found blocks of {size}\..*scheme\.block"
    ):
        Learned(size).check(32)
    with pytest.raises(ValueError, match=f"size {size} is not supported.*16, 32, 64, 128"):
        hadamard_matrix(size)


@pytest.mark.parametrize(("size", "group"), [(16, 32), (32, 64), (16, 64)])
def test_learned_blocks_hold_whole_groups(size, group):
    with pytest.raises(FormatError, match=rf"whole groups of {group}; found blocks of {size}\."):
        Learned(size).check(group)
    Hadamard(size).check(group)
    Learned(group).check(group)


def test_without_a_transform_there_are_no_blocks():
    UNCHANGED.check(32)
    with pytest.raises(FormatError, match="no blocks, found blocks of 64"):
        type(UNCHANGED)(64).check(32)


@pytest.mark.parametrize(("k", "size"), [(192, 64), (160, 32), (96, 32), (384, 128), (5120, 128)])
def test_where_a_block_does_not_divide_k_the_largest_power_of_two_does(k, size):
    """One size for all blocks of an input; every method then does what the transform of that size does."""
    x, w, s = tensors(k)
    x, h = x.float(), (x.T @ x).float()
    learned = encode_blocks(
        torch.randn(k // size, size, size, generator=torch.Generator().manual_seed(2)) + 8 * torch.eye(size)
    )
    for kind, basis in ((Hadamard, None), (Smoothed, s), (Learned, learned)):
        one, exact = kind(128), kind(size)
        assert one.block_of(k) == size and one.stored(k) == exact.stored(k)
        assert torch.equal(one.input(x, basis), exact.input(x, basis))
        assert torch.equal(one.hessian(h, basis), exact.hessian(h, basis))
        weight = one.weight(w, basis)
        assert torch.equal(weight, exact.weight(w, basis))
        assert torch.equal(one.restore(weight, basis), exact.restore(weight, basis))
    assert torch.equal(Learned(128).plain(k), Learned(size).plain(k))
    found, expected = (kind.candidates([w.float()], h, s.float(), (0.5,)) for kind in (Learned(128), Learned(size)))
    assert found.keys() == expected.keys() == {"off", "0.5", "learned"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_rotation_by_blocks_that_do_not_divide_k():
    with pytest.raises(ValueError, match=r"blocks of 128 do not divide .*\[2, 192\]"):
        rotate(torch.ones(2, 192), 128, 1.0)


def test_a_hessian_of_few_tokens_keeps_a_diagonal_that_is_not_negative():
    h = torch.eye(64)
    h[3, 3], h[5, 5] = -5e-5, 0.0
    assert settle(h) is h and h[3, 3] == 0 and h[5, 5] == 0 and h[7, 7] == 1
    h[3, 3] = -1e-2  # that is no rounding: the solvers refuse it
    assert settle(h)[3, 3] == -torch.tensor(1e-2)
    constant = torch.ones(1, 256)  # in the rotated basis one channel a block has all the energy
    for transform, basis in EVERY.values():
        diagonal = transform.hessian(constant.T @ constant, basis).diagonal()
        assert (diagonal >= 0).all() and diagonal.sum() > 0


@pytest.mark.parametrize("rows", [7, 48, 300])
@every
def test_an_input_is_quantized_beside_itself(transform, basis, rows):
    """Values may be written over the changed input, never over the input: by every product of learned blocks."""
    scheme = Scheme(get_format("mxfp4"), transform)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    wanted = scheme.format.fake_quantize(scheme.transform_input(x, basis), scale_rule=scheme.input_rule)
    found = scheme.quantize_input(x, basis)
    assert torch.equal(found, wanted) and torch.equal(x, before)
    assert found.data_ptr() != x.data_ptr() and not scheme.quantize_input(x.requires_grad_(), basis).requires_grad


def test_a_class_with_an_input_of_its_own_makes_no_new_tensor_unless_it_says_so():
    class Viewed(Learned):
        kind = "viewed"

        def input(self, x, basis):
            return x

    x = torch.randn(16, K)
    before = x.clone()
    scheme = Scheme(get_format("mxfp4"), Viewed(64))
    assert not torch.equal(scheme.quantize_input(x, None), x) and torch.equal(x, before)
