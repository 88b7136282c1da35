"""Matrix products and expand_weight under the interpreter, against float64 and against their torch references."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from ptq import formats
from ptq.runtime import PackedWeight, cpu, gpu, last_input, ops
from ptq.runtime.backends import BACKENDS
from ptq.runtime.kernels.expand_weight import expand_weight, expand_weight_reference
from ptq.runtime.kernels.gemm_dot_scaled import gemm_dot_scaled
from ptq.runtime.kernels.gemm_fp8 import gemm_fp8, tile_origin
from ptq.runtime.kernels.gemm_packed import gemm_packed
from ptq.runtime.kernels.quantize import quantize
from ptq.runtime.kernels.tiles import Tile, lookup
from ptq.scheme import Placement, Scheme
from ptq.scheme.learned import encode_blocks
from ptq.scheme.placement import DECODED, E4M3_RANGE
from ptq.scheme.residual import to_flags
from ptq.scheme.tensors import pack_nibbles

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
SMALL = Tile(32, 32, 64)
ROTATED = {name: Scheme.of(name, transform="hadamard", block=32) for name in ("mxfp4", "hif4")}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_weight(n, k, name="mxfp4", row_spread=0, bias=None):
    w = normal(n, k, seed=1)
    if row_spread:
        w = w * torch.ldexp(torch.ones(n, 1), -torch.arange(n).unsqueeze(1) % row_spread)
    fmt = formats.get(name)
    return PackedWeight(*fmt.pack(fmt.quantize(w)), bias, None, ROTATED[name])


def quantized(rows, k, out, name="mxfp4", **options):
    return quantize(normal(rows, k).bfloat16(), None, ROTATED[name], out, **options)


def place(weight):
    return weight.scheme.format.place(weight.codes, weight.scales)


def relative_error(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("row_spread", [0, 20])
def test_expand_mxfp4_is_exact_in_every_placement(row_spread):
    weight = packed_weight(70, 256, row_spread=row_spread)
    natural = place(weight)
    assert natural.kind == ("e4m3-row" if row_spread else "e4m3")
    e5m2 = Placement("e5m2", int(weight.scales.max()) - 127 - 13, None, "")
    expected = weight.decode().double()
    for placement in (natural, e5m2, DECODED):
        found, reference = expand_weight(weight, placement), expand_weight_reference(weight, placement)
        assert found.dtype == reference.dtype and torch.equal(found.float(), reference.float())
        exponent = placement.exponent if placement.row_exponents is None else placement.row_exponents.unsqueeze(1)
        assert torch.equal(torch.ldexp(found.double(), torch.as_tensor(exponent)), expected)


def test_expand_every_nibble_at_both_ends_of_e4m3():
    nibbles = torch.arange(32, dtype=torch.uint8) % 16
    scales = torch.tensor([[127 + E4M3_RANGE[0], 127 + E4M3_RANGE[1]]], dtype=torch.uint8)
    weight = PackedWeight(pack_nibbles(nibbles.repeat(1, 2)), scales, None, None, Scheme.of("mxfp4"))
    found = expand_weight(weight, Placement("e4m3", 0, None, "")).double()
    assert torch.equal(found, weight.decode().double())


@pytest.mark.parametrize("k", [64, 192, 512])
def test_expand_hif4_is_exact(k):
    weight = packed_weight(33, k, "hif4")
    assert torch.equal(expand_weight(weight, DECODED).float(), weight.decode())


@pytest.mark.parametrize("rows", [1, 7, 63])
@pytest.mark.parametrize("row_spread", [0, 20])
def test_gemm_fp8(rows, row_spread):
    weight = packed_weight(48, 1088, row_spread=row_spread)  # K is no multiple of the tile
    placement = place(weight)
    w = expand_weight(weight, placement)
    a = quantized(rows, 1088, "fp8", e_ref=2).values
    bias = normal(48, seed=2).bfloat16()
    arguments = (a, w, placement.exponent + 2, placement.row_exponents, bias)
    exact = a.double() @ weight.decode().double().T * 4 + bias.double()
    assert relative_error(gemm_fp8(*arguments, torch.float32, tile=SMALL), exact) < 1e-6
    assert relative_error(gemm_fp8(*arguments, torch.bfloat16, tile=SMALL), exact) < 2**-8


def test_gemm_fp8_with_a_table_tile_and_512_rows():
    weight = packed_weight(128, 256)
    placement = place(weight)
    w = expand_weight(weight, placement)
    a = quantized(512, 256, "fp8").values
    assert lookup("gemm_fp8", 90, 512, 128, 256).m == 128
    found = gemm_fp8(a, w, placement.exponent, None, None, torch.float16)
    exact = a.double() @ weight.decode().double().T
    assert found.dtype == torch.float16 and relative_error(found, exact) < 2**-10


@pytest.mark.parametrize(("rows", "columns"), [(32760, 5120), (32760, 13824), (1, 3072), (129, 257)])
def test_tile_order_visits_every_tile_once(rows, columns):
    tiles_m, tiles_n = -(-rows // 128), -(-columns // 256)
    found = torch.zeros(2, tiles_m * tiles_n, dtype=torch.int32)
    record_origins[(1,)](found, tiles_m, tiles_n, COUNT=triton.next_power_of_2(tiles_m * tiles_n))
    expected = {(m * 128, n * 256) for m in range(tiles_m) for n in range(tiles_n)}
    assert set(map(tuple, found.T.tolist())) == expected


@triton.jit
def record_origins(out_ptr, tiles_m, tiles_n, COUNT: tl.constexpr):
    tile = tl.arange(0, COUNT)
    start_m, start_n = tile_origin(tile, tiles_m, tiles_n, 128, 256, 8)
    inside = tile < tiles_m * tiles_n
    tl.store(out_ptr + tile, start_m, mask=inside)
    tl.store(out_ptr + tiles_m * tiles_n + tile, start_n, mask=inside)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("rows", [0, 1, 7, 63])
def test_gemm_packed(name, rows):
    weight = packed_weight(70, 192, name, bias=normal(70, seed=2))
    x = quantized(rows, 192, "bf16", name).values
    found = gemm_packed(x, weight, torch.float32)
    exact = x.double() @ weight.decode().double().T + weight.bias.double()
    assert found.shape == (rows, 70)
    if rows:
        assert relative_error(found, exact) < 1e-6
        rounded = gemm_packed(x, weight, torch.bfloat16)
        assert torch.equal(rounded, found.bfloat16())


@pytest.mark.skipif(TRITON < (3, 9), reason="the interpreter of this triton has no dot_scaled")
@pytest.mark.parametrize("rows", [1, 63, 130])
def test_gemm_dot_scaled(rows):
    weight = packed_weight(48, 320)
    a = quantized(rows, 320, "packed")
    bias = normal(48, seed=2)
    operands = (a.values, a.scales, weight.codes, weight.scales, bias, torch.float32)
    found = gemm_dot_scaled(*operands, tile=Tile(32, 32, 128))
    decoded = weight.scheme.format.decode_packed(a.values, a.scales)
    exact = decoded.double() @ weight.decode().double().T + bias
    assert relative_error(found, exact) < 1e-6


def layer_case(name, row_spread=0, rows=70, transform="smoothed"):
    """Input, and the weight of a layer with every tensor that there can be."""
    plain = packed_weight(48, 192, name, row_spread)
    smooth = (torch.rand(192, generator=torch.Generator().manual_seed(5)) + 0.5).bfloat16()
    scheme = Scheme.of(name, transform=transform, block=32 if transform == "smoothed" else 64)
    basis = smooth if transform == "smoothed" else encode_blocks(normal(3, 64, 64, seed=6))
    x = normal(2, rows // 2, 192).bfloat16() * 3
    return x, PackedWeight(plain.codes, plain.scales, normal(48, seed=2).bfloat16(), basis, scheme)


@pytest.mark.parametrize("transform", ["smoothed", "learned"])
@pytest.mark.parametrize(
    ("backend", "name", "row_spread", "rows"),
    [
        ("triton-fp8", "mxfp4", 0, 70),
        ("triton-fp8", "mxfp4", 20, 70),
        ("bf16-decode", "mxfp4", 0, 10),
        ("bf16-decode", "mxfp4", 20, 70),
        ("bf16-decode", "hif4", 0, 10),
        ("bf16-decode", "hif4", 0, 70),
    ],
)
def test_whole_layer_equals_the_fake_quant_reference(backend, name, row_spread, rows, transform):
    x, weight = layer_case(name, row_spread, rows, transform)
    found = ops.execute(BACKENDS[backend], x, weight, ops.placement_of(weight))
    assert found.dtype == torch.bfloat16
    assert relative_error(found, cpu.linear(x.float(), weight)) < 2**-8 + 1e-5


@pytest.mark.parametrize(
    ("backend", "name", "row_spread", "rows"),
    [
        ("triton-fp8", "mxfp4", 20, 70),
        ("dot-scaled", "mxfp4", 0, 70),
        ("bf16-decode", "mxfp4", 0, 10),
        ("bf16-decode", "hif4", 0, 70),
    ],
)
def test_residual_blocks_of_a_whole_layer(backend, name, row_spread, rows, monkeypatch):
    if backend == "dot-scaled" and TRITON < (3, 9):
        pytest.skip("the interpreter of this triton has no dot_scaled")
    monkeypatch.setattr("ptq.runtime.kernels.gemm_dot_scaled.tile_for", lambda *_: Tile(32, 32, 128))
    x, weight = layer_case(name, row_spread, rows, "learned")
    plain = cpu.linear(x.float(), weight)
    weight = dataclasses.replace(weight, residual=to_flags((0, 2), weight.k))
    expected = cpu.linear(x.float(), weight)
    found = ops.execute(BACKENDS[backend], x, weight, ops.placement_of(weight))
    assert relative_error(found, expected) < 2**-8 + 1e-5
    assert relative_error(plain, expected) > 0.03  # it is another product


@pytest.mark.parametrize(("name", "row_spread"), [("mxfp4", 0), ("mxfp4", 20), ("hif4", 0)])
def test_expanded_columns_of_residual_blocks(name, row_spread):
    weight = dataclasses.replace(packed_weight(70, 192, name, row_spread), residual=to_flags((0, 2), 192))
    placement = place(weight)
    found = expand_weight(weight, placement)
    assert found.shape == (70, 320) and torch.equal(found.float(), expand_weight_reference(weight, placement).float())
    assert torch.equal(weight.widened().decode(), weight.operand())


def exact_scaled_mm(a, w, a_factor, w_factor, *, bias=None, out_dtype, use_fast_accum):
    """torch._scaled_mm as the hardware does it without fast accumulation: exact sums, rounded to float32, then to the output."""
    assert not use_fast_accum and a.dtype == torch.float8_e5m2 and w.dtype == torch.float8_e4m3fn
    assert w.stride(0) == 1  # column-major, as cuBLASLt wants it
    y = (a.double() @ w.double() * a_factor.double() * w_factor.double()).float()
    return (y if bias is None else y + bias.float()).to(out_dtype)


def layer_with_outliers(name, rule, k, n=16, row_spread=0):
    """Input with a few channels 30 times larger and one 1000 times, and a weight whose scales follow the rule."""
    fmt, w = formats.get(name), normal(n, k, seed=1) / k**0.5
    if row_spread:
        w = torch.ldexp(w, -torch.arange(n).unsqueeze(1) * 2)
    x = normal(24, k)
    x[:, :: k // 8] *= 30
    x[:, 5] *= 1000
    weight_rule = rule if name == "hif4" else "floor"
    packed = fmt.quantize_and_pack(w, scale_rule=weight_rule)
    return x.bfloat16(), PackedWeight(*packed, normal(n, seed=2).bfloat16(), None, Scheme.of(name, input_rule=rule))


@pytest.mark.parametrize(("row_spread", "dtype"), [(0, torch.bfloat16), (1, torch.float32)])
@pytest.mark.parametrize(("name", "rule"), [("mxfp4", "even"), ("hif4", "p2")])
def test_exact_sums_equal_the_fake_quant_product(name, rule, row_spread, dtype, monkeypatch):
    """The contract of scaled-mm: the product of fake-quantized input and decoded weight, rounded once, at the largest K."""
    monkeypatch.setattr(torch, "_scaled_mm", exact_scaled_mm)
    x, weight = layer_with_outliers(name, rule, 13824, row_spread=row_spread)
    x, placement = x.to(dtype), place(weight)
    assert placement.kind == ("e4m3-row" if row_spread else "e4m3")
    found = ops.execute(BACKENDS["scaled-mm"], x, weight, placement)
    fake = weight.scheme.quantize_input(x, None)
    exact = fake.double() @ weight.decode().double().T
    assert torch.equal(exact.float().double(), exact)  # no float32 sum of these products rounds, in any order
    assert torch.equal(found, (exact.float() + weight.bias.float()).to(dtype))


def test_empty_input():
    x, weight = layer_case("mxfp4")
    assert len(BACKENDS) >= 5
    for backend in BACKENDS.values():
        assert ops.execute(backend, x[:, :0], weight, DECODED).shape == (2, 0, 48)


def test_projections_of_one_input_share_its_quantization():
    x, weight = layer_case("mxfp4")
    copied, doubled = (dataclasses.replace(weight, basis=basis) for basis in (weight.basis.clone(), weight.basis * 2))
    first = gpu.quantized_input(x, weight, "fp8")
    assert gpu.quantized_input(x, copied, "fp8") is first  # equal by value, as q, k and v store it
    assert gpu.quantized_input(x, doubled, "fp8") is not first
    again = gpu.quantized_input(x, weight, "fp8")
    x[0, 0, 0] = 100
    changed = gpu.quantized_input(x, weight, "fp8")
    assert changed is not again and not torch.equal(changed.values.float(), again.values.float())
    del x
    assert last_input._last is None  # freed with its input
