"""Choosing and forcing backends, for machines that are not here; the custom operator and torch.compile on this one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq import formats, ui
from ptq.errors import UsageError
from ptq.runtime import QuantLinear, QuantSpec, backends, cpu, ops
from ptq.runtime.backends import Machine, Shape, choose, obstacle
from ptq.runtime.exactness import BF16_DECODED, Placement

HOPPER = Machine("cuda", (9, 0), True)
BLACKWELL, CONSUMER = Machine("cuda", (10, 0), True), Machine("cuda", (12, 0), True)
ADA, AMPERE, VOLTA = (Machine("cuda", capability, True) for capability in ((8, 9), (8, 6), (7, 0)))
CPU = Machine("cpu", (0, 0), True)
MACHINES = (HOPPER, BLACKWELL, CONSUMER, ADA, AMPERE, VOLTA, CPU, Machine("cuda", (9, 0), False))
WAN = Shape(32760, 5120, 5120)
TENSOR, ROW = Placement("e4m3", -6, None, "fits"), Placement("e4m3-row", 0, torch.zeros(1), "span 20")
WIDE = Placement("bf16", 0, None, "span 40")
MXFP4, HIF4 = QuantSpec("mxfp4", 32), QuantSpec("hif4", 64)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends.use_backend(None)
    yield
    backends.use_backend(None)


@pytest.mark.parametrize(
    ("machine", "spec", "placement", "shape", "expected"),
    [
        (HOPPER, MXFP4, TENSOR, WAN, "triton-fp8"),
        (HOPPER, MXFP4, ROW, WAN, "triton-fp8"),
        (HOPPER, MXFP4, WIDE, WAN, "bf16-decode"),
        (HOPPER, HIF4, BF16_DECODED, WAN, "bf16-decode"),
        (HOPPER, MXFP4, TENSOR, Shape(1, 5120, 5120), "bf16-decode"),
        (BLACKWELL, MXFP4, WIDE, WAN, "dot-scaled"),
        (CONSUMER, MXFP4, TENSOR, WAN, "dot-scaled"),
        (BLACKWELL, HIF4, BF16_DECODED, WAN, "bf16-decode"),
        (ADA, MXFP4, TENSOR, WAN, "scaled-mm"),
        (ADA, MXFP4, ROW, WAN, "bf16-decode"),
        (AMPERE, MXFP4, TENSOR, WAN, "bf16-decode"),
        (CPU, MXFP4, TENSOR, WAN, "cpu"),
    ],
)
def test_choice(machine, spec, placement, shape, expected):
    choice = choose(spec, shape, placement, machine, None)
    assert choice.backend == expected and choice.reason


def test_a_lower_choice_says_what_ruled_out_the_better_ones():
    reason = choose(MXFP4, WAN, WIDE, HOPPER, None).reason
    assert "not dot-scaled" in reason and "not triton-fp8" in reason and "span 40" in reason


@given(
    st.sampled_from(MACHINES),
    st.sampled_from((MXFP4, HIF4)),
    st.sampled_from((TENSOR, ROW, WIDE)),
    st.sampled_from((1, 63, 64, 65, 512, 32760)),
    st.sampled_from(backends.BACKENDS),
)
def test_forcing_runs_that_backend_or_says_why_not(machine, spec, placement, rows, backend):
    shape = Shape(rows, 5120, 5120)
    reason = obstacle(backend, spec, shape, placement, machine)
    if reason is None:
        assert choose(spec, shape, placement, machine, backend).backend == backend
    else:
        with pytest.raises(UsageError) as error:
            choose(spec, shape, placement, machine, backend)
        assert backend in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize("machine", [VOLTA, Machine("cuda", (9, 0), False)])
def test_no_backend_at_all_is_an_error_with_every_reason(machine):
    with pytest.raises(UsageError, match="No backend can run") as error:
        choose(MXFP4, WAN, TENSOR, machine, None)
    assert "bf16-decode" in str(error.value)


def test_preview_for_doctor():
    assert backends.preview(HOPPER)["mxfp4"].startswith("triton-fp8: ")
    assert backends.preview(HOPPER)["hif4"].startswith("bf16-decode: ")
    assert "No backend" in backends.preview(VOLTA)["mxfp4"]
    backends.use_backend("scaled-mm")
    assert backends.preview(ADA)["mxfp4"] == "scaled-mm: asked for"
    assert "exact in bfloat16 only" in backends.preview(ADA)["hif4"]


def make_layer(name="mxfp4", smooth=True, k=128, n=48):
    generator = torch.Generator().manual_seed(0)
    codes = formats.get(name).quantize(torch.randn(n, k, generator=generator))
    vector = (torch.rand(k, generator=generator) + 0.5).bfloat16() if smooth else None
    return QuantLinear.from_codes(codes, QuantSpec(name, 32, smooth), torch.randn(n, generator=generator), vector)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
def test_cpu_equals_the_fake_quant_reference(name, dtype, smooth):
    layer = make_layer(name, smooth)
    x = torch.randn(2, 9, 128, dtype=dtype)
    weight = cpu.decode(layer.weight_packed, layer.weight_scale, name).double()
    expected = layer.spec.quantize_input(x, layer.smooth).double() @ weight.T + layer.bias.double()
    found = layer(x)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_weights_beyond_the_cache_are_decoded_in_tiles(monkeypatch):
    layer, x = make_layer(n=70), torch.randn(5, 128)
    cached = layer(x)
    monkeypatch.setattr(cpu.decoded_cache, "limit_bytes", 0)
    monkeypatch.setattr(cpu, "TILE_BYTES", 4 * 128 * 16)  # 16 rows at a time
    torch.testing.assert_close(layer(x), cached, rtol=1e-6, atol=1e-5)


def test_inputs_of_every_layout():
    layer = make_layer()
    x = torch.randn(128, 9).T
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert layer(torch.empty(2, 0, 128)).shape == (2, 0, 48)
    assert layer(torch.randn(128)).shape == (48,)


def test_forced_by_environment_or_call_is_an_error_on_the_cpu(monkeypatch):
    layer, x = make_layer(), torch.randn(3, 128)
    monkeypatch.setenv(backends.VARIABLE, "triton-fp8")
    with pytest.raises(UsageError, match=r"triton-fp8 was asked for .* the tensors are on cpu"):
        layer(x)
    backends.use_backend("cpu")  # the call wins over the environment
    assert layer(x).shape == (3, 48)
    backends.use_backend(None)
    monkeypatch.setenv(backends.VARIABLE, "fast")
    with pytest.raises(UsageError, match=r"PTQ_BACKEND names the backend 'fast'; choose one of triton-fp8"):
        layer(x)
    with pytest.raises(UsageError, match="--backend"):
        backends.use_backend("fast")


def test_choice_is_reported_once(monkeypatch):
    lines = []
    monkeypatch.setattr(ui, "info", lines.append)
    backends.report_once.cache_clear()
    layer, x = make_layer(), torch.randn(3, 128)
    for _ in range(3):
        layer(x)
    assert lines == ["mxfp4 layers run on backend cpu: the tensors are on the CPU."]


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_compiles_into_one_graph_with_equal_results(name):
    layer, x = make_layer(name), torch.randn(2, 5, 128)
    compiled = torch.compile(lambda x: torch.relu(layer(x)) + 1, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), torch.relu(layer(x)) + 1)


def test_operator_obeys_torchs_rules():
    layer = make_layer()
    tensors = (layer.weight_packed, layer.weight_scale, layer.bias, layer.smooth)
    torch.library.opcheck(ops.linear_op, (torch.randn(2, 3, 128), *tensors, "mxfp4", 32, None, None, False))


def test_placement_follows_the_codes():
    layer = make_layer()
    first = ops.placement_of(layer.weight_packed, layer.weight_scale, "mxfp4")
    assert ops.placement_of(layer.weight_packed, layer.weight_scale, "mxfp4") is first
    with torch.no_grad():
        layer.weight_scale[0, 0] += 40
    assert ops.placement_of(layer.weight_packed, layer.weight_scale, "mxfp4").kind != first.kind
    assert ops.placement_of(layer.weight_packed, layer.weight_scale, "hif4") is BF16_DECODED


def test_placement_follows_storage_put_behind_a_parameter():
    layer, other = make_layer(), make_layer()
    first = ops.placement_of(layer.weight_packed, layer.weight_scale, "mxfp4")
    with torch.no_grad():
        other.weight_scale[0, 0] += 40
    layer.weight_scale.data = other.weight_scale.data
    assert ops.placement_of(layer.weight_packed, layer.weight_scale, "mxfp4").kind != first.kind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [name for name in backends.BACKENDS if name != "cpu"])
@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("rows", [1, 7, 63, 512, 2080])
def test_gpu_equals_the_cpu(backend, name, rows):
    layer = make_layer(name, k=1024, n=256)
    x = torch.randn(rows, 1024).bfloat16()
    expected = layer(x.float())
    backends.use_backend(backend)
    on_gpu, x_gpu = layer.to("cuda"), x.to("cuda")
    machine = backends.machine_of(x_gpu.device)
    placement = ops.placement_of(on_gpu.weight_packed, on_gpu.weight_scale, name)
    if obstacle(backend, layer.spec, Shape(rows, 256, 1024), placement, machine):
        with pytest.raises(UsageError):
            on_gpu(x_gpu)
        return
    error = (on_gpu(x_gpu).float().cpu() - expected).abs().max() / expected.abs().max()
    assert error < 6e-3  # bfloat16 output and, on FP8 units, about 14 bits of accumulator
