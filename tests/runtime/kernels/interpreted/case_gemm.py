"""Matrix products and expand_weight under the interpreter, against float64 and against their torch references."""

import pytest
import torch
import triton
import triton.language as tl

from ptq import formats
from ptq.runtime import backends, cpu, ops, sharing
from ptq.runtime.exactness import BF16_DECODED, E4M3_RANGE, Placement, place
from ptq.runtime.kernels.expand_weight import expand_weight, expand_weight_reference
from ptq.runtime.kernels.ffn_fused import ffn_up_quantized, ffn_up_quantized_reference
from ptq.runtime.kernels.gemm_dot_scaled import gemm_dot_scaled, gemm_dot_scaled_reference
from ptq.runtime.kernels.gemm_fp8 import gemm_fp8, gemm_fp8_reference, tile_origin
from ptq.runtime.kernels.gemm_packed import gemm_packed, gemm_packed_reference
from ptq.runtime.kernels.hadamard_quantize import hadamard_quantize
from ptq.runtime.kernels.tiles import Tile, lookup
from ptq.runtime.spec import QuantSpec

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
SMALL = Tile(32, 32, 64)
SPEC = QuantSpec("mxfp4", 32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_weight(n, k, name="mxfp4", row_spread=0):
    w = normal(n, k, seed=1)
    if row_spread:
        w = w * torch.ldexp(torch.ones(n, 1), -torch.arange(n).unsqueeze(1) % row_spread)
    fmt = formats.get(name)
    return fmt.pack(fmt.quantize(w))


def relative_error(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("row_spread", [0, 20])
def test_expand_mxfp4_is_exact_in_every_placement(row_spread):
    packed, scale = packed_weight(70, 256, row_spread=row_spread)
    natural = place(packed, scale)
    assert natural.kind == ("e4m3-row" if row_spread else "e4m3")
    e5m2 = Placement("e5m2", int(scale.max()) - 127 - 13, None, "")
    expected = cpu.decode(packed, scale, "mxfp4").double()
    for placement in (natural, e5m2, BF16_DECODED):
        found = expand_weight(packed, scale, "mxfp4", placement)
        reference = expand_weight_reference(packed, scale, "mxfp4", placement)
        assert found.dtype == reference.dtype and torch.equal(found.float(), reference.float())
        exponent = placement.exponent if placement.row_exponents is None else placement.row_exponents.unsqueeze(1)
        assert torch.equal(torch.ldexp(found.double(), torch.as_tensor(exponent)), expected)


def test_expand_every_nibble_at_both_ends_of_e4m3():
    nibbles = torch.arange(32, dtype=torch.uint8) % 16
    packed = formats.base.pack_nibbles(nibbles.repeat(1, 2))
    scale = torch.tensor([[127 + E4M3_RANGE[0], 127 + E4M3_RANGE[1]]], dtype=torch.uint8)
    found = expand_weight(packed, scale, "mxfp4", Placement("e4m3", 0, None, "")).double()
    assert torch.equal(found, cpu.decode(packed, scale, "mxfp4").double())


@pytest.mark.parametrize("k", [64, 192, 512])
def test_expand_hif4_is_exact(k):
    packed, scale = packed_weight(33, k, "hif4")
    found = expand_weight(packed, scale, "hif4", BF16_DECODED)
    assert torch.equal(found.float(), cpu.decode(packed, scale, "hif4"))


@pytest.mark.parametrize("rows", [1, 7, 63])
@pytest.mark.parametrize("accurate", [False, True])
@pytest.mark.parametrize("row_spread", [0, 20])
def test_gemm_fp8(rows, accurate, row_spread):
    packed, scale = packed_weight(48, 1088, row_spread=row_spread)  # K is no multiple of the tile or of 512
    placement = place(packed, scale)
    w = expand_weight(packed, scale, "mxfp4", placement)
    a = hadamard_quantize(normal(rows, 1088).bfloat16(), None, SPEC, "fp8", e_ref=2).values
    bias = normal(48, seed=2).bfloat16()
    arguments = (a, w, placement.exponent + 2, placement.row_exponents, bias)
    exact = a.double() @ cpu.decode(packed, scale, "mxfp4").double().T * 4 + bias.double()
    assert relative_error(gemm_fp8(*arguments, torch.float32, accurate=accurate, tile=SMALL), exact) < 1e-6
    assert relative_error(gemm_fp8_reference(*arguments, torch.float64), exact) < 1e-6
    assert relative_error(gemm_fp8(*arguments, torch.bfloat16, accurate=accurate, tile=SMALL), exact) < 2**-8


def test_gemm_fp8_with_a_table_tile_and_512_rows():
    packed, scale = packed_weight(128, 256)
    placement = place(packed, scale)
    w = expand_weight(packed, scale, "mxfp4", placement)
    a = hadamard_quantize(normal(512, 256).bfloat16(), None, SPEC, "fp8").values
    assert lookup("gemm_fp8", 90, 512, 128, 256).m == 128
    found = gemm_fp8(a, w, placement.exponent, None, None, torch.float16)
    exact = a.double() @ cpu.decode(packed, scale, "mxfp4").double().T
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
    packed, scale = packed_weight(70, 192, name)
    x = hadamard_quantize(normal(rows, 192).bfloat16(), None, QuantSpec(name, 32), "bf16").values
    bias = normal(70, seed=2)
    found = gemm_packed(x, packed, scale, name, bias, torch.float32)
    exact = x.double() @ cpu.decode(packed, scale, name).double().T + bias.double()
    assert found.shape == (rows, 70)
    if rows:
        assert relative_error(found, exact) < 1e-6
        assert relative_error(gemm_packed_reference(x, packed, scale, name, bias, torch.float32), exact) < 1e-6
        rounded = gemm_packed(x, packed, scale, name, bias, torch.bfloat16)
        assert torch.equal(rounded, found.bfloat16())


@pytest.mark.skipif(TRITON < (3, 9), reason="the interpreter of this triton has no dot_scaled")
@pytest.mark.parametrize("rows", [1, 63, 130])
def test_gemm_dot_scaled(rows):
    packed, scale = packed_weight(48, 320)
    a = hadamard_quantize(normal(rows, 320).bfloat16(), None, SPEC, "packed")
    bias = normal(48, seed=2)
    found = gemm_dot_scaled(a.values, a.scales, packed, scale, bias, torch.float32, tile=Tile(32, 32, 128))
    exact = cpu.decode(a.values, a.scales, "mxfp4").double() @ cpu.decode(packed, scale, "mxfp4").double().T + bias
    assert relative_error(found, exact) < 1e-6
    reference = gemm_dot_scaled_reference(a.values, a.scales, packed, scale, bias, torch.float32)
    assert relative_error(reference, exact) < 1e-6


@pytest.mark.parametrize(("rows", "smooth"), [(1, False), (63, True)])
def test_ffn_fused_gives_the_codes_of_the_unfused_layers(rows, smooth):
    packed, scale = packed_weight(96, 128)
    placement = place(packed, scale)
    w = expand_weight(packed, scale, "mxfp4", placement)
    a = hadamard_quantize(normal(rows, 128).bfloat16(), None, SPEC, "fp8").values
    vector = (torch.rand(96, generator=torch.Generator().manual_seed(5)) + 0.5).bfloat16() if smooth else None
    following = QuantSpec("mxfp4", 32, smooth)
    arguments = (a, w, placement.exponent, None, normal(96, seed=2).bfloat16(), vector, following)
    found = ffn_up_quantized(*arguments, tile=SMALL).values.float()
    expected = ffn_up_quantized_reference(*arguments).values.float()
    # exp and tanh differ in the last float32 bit between libraries; bfloat16 rounding hides it nearly always.
    assert found.abs().sum() > 0 and (found != expected).float().mean() < 2e-3


def backend_case(name, row_spread=0, rows=70):
    packed, scale = packed_weight(48, 192, name, row_spread)
    x = normal(2, rows // 2, 192).bfloat16() * 3
    smooth = (torch.rand(192, generator=torch.Generator().manual_seed(5)) + 0.5).bfloat16()
    return x, packed, scale, normal(48, seed=2).bfloat16(), smooth, QuantSpec(name, 32, True)


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
def test_whole_layer_equals_the_fake_quant_reference(backend, name, row_spread, rows):
    x, *weights = backend_case(name, row_spread, rows)
    packed, scale = weights[:2]
    found = ops.execute(backend, x, *weights, ops.placement_of(packed, scale, name))
    assert found.dtype == torch.bfloat16
    assert relative_error(found, cpu.linear(x.float(), *weights)) < 2**-8 + 1e-5


def test_empty_input():
    x, *weights = backend_case("mxfp4")
    for backend in set(backends.BACKENDS):
        assert ops.execute(backend, x[:, :0], *weights, BF16_DECODED).shape == (2, 0, 48)


def test_projections_of_one_input_share_its_quantization():
    x, _, _, _, smooth, spec = backend_case("mxfp4")
    first = ops.quantized_input(x, smooth, spec, "fp8")
    assert ops.quantized_input(x, smooth.clone(), spec, "fp8") is first  # equal by value, as q, k and v store it
    assert ops.quantized_input(x, smooth * 2, spec, "fp8") is not first
    again = ops.quantized_input(x, smooth, spec, "fp8")
    x[0, 0, 0] = 100
    changed = ops.quantized_input(x, smooth, spec, "fp8")
    assert changed is not again and not torch.equal(changed.values.float(), again.values.float())
    del x
    assert sharing._last is None  # freed with its input
