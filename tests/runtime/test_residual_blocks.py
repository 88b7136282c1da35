"""Layers with residual blocks against the definition, written here in float64: W Q(x') + W_chosen Q(x' - Q(x'))."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from ptq import formats
from ptq.errors import UsageError
from ptq.runtime import QuantLinear, cpu, ops
from ptq.runtime.cache import DecodedCache
from ptq.runtime.last_input import forget_input
from ptq.scheme import Scheme
from ptq.scheme.learned import encode_blocks

K, N = 320, 24
BLOCKS = (0, 3)
SCHEMES = [
    Scheme.of("hif4"),
    Scheme.of("mxfp4", transform="learned", block=32, input_rule="even"),
    Scheme.of("hif4", transform="learned", block=64, input_rule="mse"),
    Scheme.of("hif4", transform="learned", block=64, input_rule="p2"),
]
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(scheme: Scheme, blocks: tuple[int, ...] | None = BLOCKS) -> QuantLinear:
    basis = None
    if scheme.transform.tensor is not None:
        size = scheme.transform.block
        basis = encode_blocks(randn(K // size, size, size, seed=2))
    codes = scheme.format.quantize(scheme.transform.weight(randn(N, K, seed=1), basis))
    return QuantLinear.from_codes(codes, scheme, randn(N, seed=3), basis, blocks)


def reference(layer: QuantLinear, x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    scheme, rule = layer.scheme, layer.scheme.input_rule
    changed = scheme.transform_input(x, layer.basis)
    values = scheme.format.fake_quantize(changed, scale_rule=rule)
    weight = scheme.format.dequantize(layer.codes()).double()
    y = values.double() @ weight.T + layer.bias.double()
    for block in blocks:
        part = slice(64 * block, 64 * block + 64)
        rest = (changed[:, part] - values[:, part]).contiguous()
        y += scheme.format.fake_quantize(rest, scale_rule=rule).double() @ weight[:, part].T
    return y


@EVERY_SCHEME
def test_a_layer_is_the_definition_and_nearer_to_the_exact_product(scheme):
    layer, plain, x = make(scheme), make(scheme, None), randn(7, K, seed=4)
    found, expected = layer(x), reference(layer, x, BLOCKS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    exact = scheme.transform_input(x, layer.basis).double() @ scheme.format.dequantize(layer.codes()).double().T
    exact += layer.bias.double()
    errors = [float((y.double() - exact).square().sum()) for y in (plain(x), found, make(scheme, tuple(range(5)))(x))]
    assert errors[1] < errors[0] and errors[2] < 0.03 * errors[0]
    for none in (make(scheme, ()), plain):
        forget_input()
        assert torch.equal(none(x), plain(x))


def test_whole_weight_and_tiles_give_the_same(monkeypatch):
    layer, x = make(SCHEMES[2]), randn(5, K, seed=4)
    whole = layer(x)
    monkeypatch.setattr(cpu, "decoded_cache", DecodedCache(0))
    monkeypatch.setattr(cpu, "TILE_BYTES", 4 * 7 * (K + 128))
    torch.testing.assert_close(layer(x), whole, rtol=1e-6, atol=1e-5)


def test_layers_of_one_input_share_it_only_with_the_same_blocks(monkeypatch):
    made, original = [], Scheme.quantize_input
    monkeypatch.setattr(
        Scheme, "quantize_input", lambda self, x, *rest: made.append(rest[1]) or original(self, x, *rest)
    )
    forget_input()
    x = randn(5, K, seed=4)
    first, same, other = make(SCHEMES[2]), make(SCHEMES[2]), make(SCHEMES[2], (1,))
    assert torch.equal(first(x), same(x)) and made == [BLOCKS]
    torch.testing.assert_close(other(x).double(), reference(other, x, (1,)), rtol=1e-5, atol=1e-4)
    assert made[:2] == [BLOCKS, (1,)]


def test_the_operator_compiles_once_for_layers_with_other_blocks():
    layers = [make(SCHEMES[2], blocks) for blocks in (BLOCKS, (2,), ())]
    x = randn(5, K, seed=4)
    expected = [layer(x) for layer in layers]
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    class Block(nn.Module):
        def __init__(self, layer: QuantLinear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + 1

    torch._dynamo.reset()
    scheme = layers[0].scheme
    for layer, wanted in zip(layers, expected, strict=True):
        layer.scheme = scheme  # one a model, as when it is loaded
        block = Block(layer)
        block.compile(backend=backend, fullgraph=True)
        assert torch.equal(block(x), wanted + 1)
    assert len(graphs) == 1
    packed = layers[0].packed
    tensors = (packed.codes, packed.scales, packed.bias, packed.basis, packed.scheme.key)
    assert torch.equal(ops.linear_op(x, *tensors, packed.residual), expected[0])
    assert torch.equal(ops.linear_op(x, *tensors), expected[2])
    torch._dynamo.reset()


def test_copies_moves_and_pickles_keep_the_blocks():
    layer, x = make(SCHEMES[2]), randn(3, K, seed=4)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for one in (
        copy.deepcopy(layer),
        loaded,
        QuantLinear.from_packed(layer.packed),
        copy.deepcopy(layer).double().float(),
    ):
        assert one.packed.blocks == BLOCKS and torch.equal(one(x), expected)
    assert "2 residual blocks" in repr(layer) and "residual" not in repr(make(SCHEMES[2], None))
    assert not any("residual" in name for name in layer.state_dict())


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ((0, 5), "320 channels have the numbers 0 to 4; found [0, 5]"),
        ((-1,), "320 channels have the numbers 0 to 4; found [-1]"),
        ((3, 1), "ascending order, each once; found [3, 1]"),
        ((1, 1), "ascending order, each once; found [1, 1]"),
    ],
)
def test_blocks_that_a_layer_does_not_have_are_refused(blocks, words):
    with pytest.raises(formats.FormatError) as caught:
        QuantLinear(K, N, False, SCHEMES[0], residual=blocks)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, UsageError)
