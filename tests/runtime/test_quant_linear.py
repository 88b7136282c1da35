"""QuantLinear against the fake-quant reference, written here in float64 from the codes and the definition.

Stated difference: the layer computes the product in float32, so it may differ from the float64 reference by accumulation
error, at most 2^-22 of sum_k |x_k w_nk| for K = 256 (measured: 2^-25.4), plus the rounding to the input's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptq import formats
from ptq.errors import UsageError
from ptq.runtime import PackedWeight, QuantLinear, cpu
from ptq.scheme import Learned, Scheme, Smoothed
from ptq.scheme.hadamard import hadamard_matrix
from ptq.scheme.learned import encode_blocks

FORMATS = pytest.mark.parametrize("name", ["hif4", "mxfp4"])
K, N = 256, 24
ACCUMULATION = 2.0**-22


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(name: str, block: int, smooth: bool) -> Scheme:
    """Rotated in blocks (0: not), with or without factors before that."""
    transform = "smoothed" if smooth else "hadamard" if block else "none"
    return Scheme.of(name, transform=transform, block=block)


def make(scheme: Scheme, bias: bool = True, k: int = K, n: int = N) -> tuple[QuantLinear, Tensor]:
    """(layer, the original weight)"""
    weight, basis = randn(n, k, seed=1), None
    if isinstance(scheme.transform, Smoothed):
        basis = (0.5 + randn(k, seed=2).abs()).to(torch.bfloat16)
    if isinstance(scheme.transform, Learned):
        block = scheme.transform.block
        basis = encode_blocks(randn(k // block, block, block, seed=2))
    codes = scheme.format.quantize(scheme.transform.weight(weight, basis))
    return QuantLinear.from_codes(codes, scheme, randn(n, seed=3) if bias else None, basis), weight


def block_hadamard(k: int, size: int) -> Tensor:
    """The orthonormal block-diagonal rotation, float64 [k, k]."""
    return torch.block_diag(*[hadamard_matrix(size).double()] * (k // size)) if size else torch.eye(k).double()


def reference(layer: QuantLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output in float64, sum of the absolute products): dequantized weight, fake-quantized input."""
    quantized = layer.scheme.quantize_input(x, layer.basis).double()
    weight = layer.scheme.format.dequantize(layer.codes()).double()
    y = quantized @ weight.T
    return y if layer.bias is None else y + layer.bias.double(), quantized.abs() @ weight.abs().T


def assert_close(layer: QuantLinear, x: Tensor) -> None:
    y = layer(x)
    expected, magnitude = reference(layer, x)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], layer.out_features)
    # One unit in the last place of the output's dtype, at the size of the expected value.
    rounding = 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps * expected.abs()
    assert ((y.double() - expected).abs() <= ACCUMULATION * magnitude + rounding).all()


@FORMATS
@pytest.mark.parametrize("rotation", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_fake_quant_reference(name: str, rotation: int, smooth: bool, bias: bool) -> None:
    layer, _ = make(rotated(name, rotation, smooth), bias)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_close(layer, randn(5, K, seed=4).to(dtype))


@FORMATS
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_learned_blocks(name: str, size: int, bias: bool) -> None:
    """The same contract, and the basis from the definition: x times the block-diagonal matrix that the layer stores."""
    layer, weight = make(Scheme.of(name, transform="learned", block=size), bias)
    names = {"weight_packed", "weight_scale", "transform"} | ({"bias"} if bias else set())
    assert set(dict(layer.named_parameters())) == names and layer.basis is layer.transform
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_close(layer, randn(5, K, seed=4).to(dtype))
    x = randn(7, K, seed=5)
    matrix = torch.block_diag(*layer.transform.view(torch.float8_e4m3fn).double() / 256)
    found = layer.scheme.transform_input(x, layer.transform)
    torch.testing.assert_close(found, (x.double() @ matrix).float(), rtol=1e-5, atol=1e-5)
    quantized = formats.get(name).fake_quantize(found)
    assert torch.equal(layer.scheme.quantize_input(x, layer.transform), quantized)
    # Undone, the dequantized weight is the original up to its quantization.
    restored = formats.get(name).dequantize(layer.codes()).double() @ matrix.T
    torch.testing.assert_close(layer.dequantize().double(), restored, rtol=1e-5, atol=1e-4)
    exact = layer.scheme.transform.weight(weight, layer.transform).double() @ matrix.T
    torch.testing.assert_close(exact, weight.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "block"), [("hif4", 0), ("hif4", 32), ("hif4", 96), ("mxfp4", 16)])
def test_learned_blocks_hold_whole_groups(name: str, block: int) -> None:
    with pytest.raises(formats.FormatError, match="that hold whole groups of") as caught:
        Scheme.of(name, transform="learned", block=block)
    assert f"found blocks of {block}" in str(caught.value)


@FORMATS
@pytest.mark.parametrize("rotation", [0, 16, 32, 64, 128])
def test_input_is_quantized_in_the_transformed_basis(name: str, rotation: int) -> None:
    """The input's basis, from the definition: x * smooth, times the orthonormal rotation up to a power of two."""
    layer, _ = make(rotated(name, rotation, True))
    x = randn(7, K, seed=5)
    basis = (x.double() * layer.smooth.double()) @ block_hadamard(K, rotation)
    found = layer.scheme.transform_input(x, layer.smooth).double()
    ratio = found.norm() / basis.norm()
    assert torch.allclose(found, basis * ratio, atol=1e-5)
    quantized = formats.get(name).fake_quantize(found.float())
    assert torch.equal(layer.scheme.quantize_input(x, layer.smooth), quantized)
    assert not torch.equal(quantized, found.float())


@FORMATS
@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)])
def test_leading_shapes(name: str, shape: tuple[int, ...]) -> None:
    layer, _ = make(rotated(name, 32, True))
    assert_close(layer, randn(*shape, seed=6))


def test_non_contiguous_input() -> None:
    layer, _ = make(rotated("hif4", 64, False))
    x = randn(K, 6, seed=7).T
    assert torch.equal(layer(x), layer(x.contiguous()))


@FORMATS
@pytest.mark.parametrize("rows", [1, 7, N])
def test_tiles_equal_the_cached_weight(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of output rows change the order of accumulation at most: within the stated difference."""
    layer, _ = make(rotated(name, 32, True))
    x = randn(2, 9, K, seed=8)
    monkeypatch.setattr(cpu.decoded_cache, "limit_bytes", 0)
    monkeypatch.setattr(cpu, "TILE_BYTES", 4 * K * rows)
    decoded: list[int] = []
    decode = PackedWeight.decode

    def counted(self: PackedWeight, rows: slice = slice(None)) -> Tensor:
        values = decode(self, rows)
        decoded.append(len(values))
        return values

    monkeypatch.setattr(PackedWeight, "decode", counted)
    assert_close(layer, x)
    assert max(decoded) == rows and sum(decoded) == N


@FORMATS
@pytest.mark.parametrize("rotation", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("smooth", [False, True])
def test_dequantize_undoes_the_transforms(name: str, rotation: int, smooth: bool) -> None:
    """Back in the original basis the weight is the original one up to quantization noise, and no closer than that.

    Smoothing with these random factors spreads the noise unevenly and so adds to it; a wrong basis would give above 1.
    """
    layer, weight = make(rotated(name, rotation, smooth), n=64)
    error = ((layer.dequantize() - weight).norm() / weight.norm()).item()
    assert 0.05 < error < 0.2
    # And exactly: with W' the decoded weight, dequantize() = W' B diag(s) up to float32.
    transformed = formats.get(name).dequantize(layer.codes()).double()
    basis = transformed @ block_hadamard(K, rotation)
    exact = basis * (layer.smooth.double() if smooth else 1)
    found = layer.dequantize().double()
    assert torch.allclose(found, exact * (found.norm() / exact.norm()), atol=1e-5)
    assert (found.norm() / weight.double().norm()).item() == pytest.approx(1, abs=0.03)


@FORMATS
def test_quality_of_the_whole_layer(name: str) -> None:
    """The layer approximates the original Linear: a wrong basis on either side would give an error above 1."""
    layer, weight = make(rotated(name, 64, True))
    x = randn(64, K, seed=9)
    exact = x @ weight.T + layer.bias
    error = ((layer(x) - exact).norm() / exact.norm()).item()
    assert 0.05 < error < 0.25


@pytest.mark.parametrize(
    ("scheme", "k"), [(Scheme.of("hif4"), 96), (Scheme.of("mxfp4"), 48), (rotated("mxfp4", 128, False), 48)]
)
def test_k_that_does_not_fit_is_refused(scheme: Scheme, k: int) -> None:
    with pytest.raises(formats.FormatError, match=f"K = {k}"):
        QuantLinear(k, 8, False, scheme)


@FORMATS
@pytest.mark.parametrize(("transform", "block"), [("none", 0), ("hadamard", 32), ("smoothed", 0), ("learned", 64)])
def test_packed_weight_and_back(name: str, transform: str, block: int) -> None:
    """The layer as one value holds the layer's own tensors, and makes the same layer again."""
    layer, _ = make(Scheme.of(name, transform=transform, block=block))
    packed = layer.packed
    assert (packed.n, packed.k) == (N, K) and packed.codes is layer.weight_packed and packed.basis is layer.basis
    assert torch.equal(packed.decode(), layer.scheme.format.dequantize(layer.codes()))
    assert torch.equal(packed.decode(slice(3, 7)), packed.decode()[3:7])
    again = QuantLinear.from_packed(packed)
    state = layer.state_dict()
    assert again.scheme == layer.scheme and again.state_dict().keys() == state.keys()
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in state.items())


def test_state_is_the_checkpoint_layout() -> None:
    layer, _ = make(rotated("hif4", 64, True))
    state = {name: (value.dtype, tuple(value.shape)) for name, value in layer.to(torch.bfloat16).state_dict().items()}
    assert state == {
        "weight_packed": (torch.uint8, (N, K // 2)),
        "weight_scale": (torch.int32, (N, K // 64)),
        "bias": (torch.bfloat16, (N,)),
        "smooth": (torch.bfloat16, (K,)),
    }
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    empty = QuantLinear(K, N, False, rotated("mxfp4", 32, False), device="meta")
    assert {name: tuple(value.shape) for name, value in empty.state_dict().items()} == {
        "weight_packed": (N, K // 2),
        "weight_scale": (N, K // 32),
    }


def test_it_is_called_as_the_linear_it_replaces() -> None:
    layer = nn.Linear(64, 8)
    scheme = Scheme.of("hif4")
    quantized = QuantLinear.from_codes(scheme.format.quantize(layer.weight.detach()), scheme, layer.bias.detach(), None)
    x = torch.randn(3, 64)
    assert torch.equal(quantized(input=x), quantized(x))


def test_the_weight_answers_what_it_is_and_has_no_values() -> None:
    layer, _ = make(rotated("mxfp4", 64, True))
    assert isinstance(layer, nn.Linear) and "weight" not in layer.state_dict() and len(list(layer.parameters())) == 4
    weight = layer.to(torch.bfloat16).weight
    assert (weight.shape, weight.dtype, weight.device.type, weight.ndim) == ((N, K), torch.bfloat16, "cpu", 2)
    assert weight.numel() == N * K and not weight.requires_grad and not hasattr(weight, "ds_shape")
    assert "[24, 256]" in repr(weight) and copy.deepcopy(layer).weight.shape == weight.shape
    assert layer.to("meta").weight.is_meta


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.weight.data,
        lambda layer: layer.weight + 1,
        lambda layer: layer.weight.float(),
        lambda layer: layer.weight[0],
        lambda layer: layer.weight.tolist(),
        lambda layer: layer.weight.numpy(),
        lambda layer: layer.weight.copy_(randn(N, K)),
        lambda layer: nn.functional.linear(randn(2, K), layer.weight),
        lambda layer: torch.zeros_like(layer.weight),
        lambda layer: setattr(layer.weight, "data", randn(N, K)),
        lambda layer: setattr(layer, "weight", nn.Parameter(randn(N, K))),
        lambda layer: setattr(layer, "weight", None),
        lambda layer: layer.reset_parameters(),
    ],
)
def test_reading_or_writing_the_weight_is_refused(use: Callable[[QuantLinear], object]) -> None:
    layer, _ = make(rotated("hif4", 64, False))
    x, state = randn(3, K), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = layer(x)
    with pytest.raises(UsageError, match="4-bit codes"):
        use(layer)
    assert torch.equal(layer(x), before)
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
