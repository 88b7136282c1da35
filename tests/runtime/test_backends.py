"""Choosing and forcing backends, for machines that are not here; the custom operator and torch.compile on this one."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq import formats, ui
from ptq.config import installed_recipes
from ptq.errors import UsageError
from ptq.runtime import QuantLinear, backends, cpu, ops
from ptq.runtime.backends import BACKENDS, Call, Machine, choose, obstacle
from ptq.runtime.diagnosis import machine_facts
from ptq.scheme import MXFP4 as MXFP4Format
from ptq.scheme import Hadamard, Placement, Scheme, Transform
from ptq.scheme.placement import DECODED

HOPPER = Machine("cuda", (9, 0), True)
BLACKWELL, CONSUMER = Machine("cuda", (10, 0), True), Machine("cuda", (12, 0), True)
ADA, AMPERE, VOLTA = (Machine("cuda", capability, True) for capability in ((8, 9), (8, 6), (7, 0)))
CPU = Machine("cpu", (0, 0), True)
MACHINES = (HOPPER, BLACKWELL, CONSUMER, ADA, AMPERE, VOLTA, CPU, Machine("cuda", (9, 0), False))
WAN = (32760, 5120, 5120)
TENSOR, ROW = Placement("e4m3", -6, None, "fits"), Placement("e4m3-row", 0, torch.zeros(1), "span 20")
WIDE, E5M2 = Placement("bf16", 0, None, "span 40"), Placement("e5m2", -9, None, "span 25")
HIF4_FAST = Scheme.of("hif4", transform="learned", block=64, input_rule="p2")
MXFP4, HIF4 = (Scheme.of(name, transform="hadamard", block=block) for name, block in (("mxfp4", 32), ("hif4", 64)))
ON_GPU = [name for name, backend in BACKENDS.items() if backend.device == "cuda"]


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends.use_backend(None)
    yield
    backends.use_backend(None)


@pytest.mark.parametrize(
    ("machine", "scheme", "placement", "shape", "expected"),
    [
        (HOPPER, MXFP4, TENSOR, WAN, "scaled-mm"),
        (HOPPER, MXFP4, ROW, WAN, "scaled-mm"),
        (HOPPER, MXFP4, E5M2, WAN, "triton-fp8"),
        (HOPPER, HIF4_FAST, ROW, WAN, "scaled-mm"),
        (BLACKWELL, HIF4_FAST, TENSOR, WAN, "scaled-mm"),
        (HOPPER, HIF4_FAST, DECODED, WAN, "bf16-decode"),
        (HOPPER, MXFP4, WIDE, WAN, "bf16-decode"),
        (HOPPER, HIF4, DECODED, WAN, "bf16-decode"),
        (HOPPER, MXFP4, TENSOR, (1, 5120, 5120), "bf16-decode"),
        (BLACKWELL, MXFP4, WIDE, WAN, "dot-scaled"),
        (CONSUMER, MXFP4, TENSOR, WAN, "dot-scaled"),
        (BLACKWELL, HIF4, DECODED, WAN, "bf16-decode"),
        (ADA, MXFP4, TENSOR, WAN, "scaled-mm"),
        (ADA, MXFP4, ROW, WAN, "scaled-mm"),
        (ADA, MXFP4, E5M2, WAN, "bf16-decode"),
        (AMPERE, MXFP4, TENSOR, WAN, "bf16-decode"),
        (CPU, MXFP4, TENSOR, WAN, "cpu"),
    ],
)
def test_choice(machine, scheme, placement, shape, expected):
    choice = choose(Call(scheme, *shape, placement, machine), None)
    assert choice.backend is BACKENDS[expected] and choice.reason


def test_a_lower_choice_says_what_ruled_out_the_better_ones():
    reason = choose(Call(MXFP4, *WAN, WIDE, HOPPER), None).reason
    assert "not dot-scaled" in reason and "not triton-fp8" in reason and "span 40" in reason


@given(
    st.sampled_from(MACHINES),
    st.sampled_from((MXFP4, HIF4)),
    st.sampled_from((TENSOR, ROW, WIDE)),
    st.sampled_from((1, 63, 64, 65, 512, 32760)),
    st.sampled_from(list(BACKENDS)),
)
def test_forcing_runs_that_backend_or_says_why_not(machine, scheme, placement, rows, backend):
    call = Call(scheme, rows, 5120, 5120, placement, machine)
    reason = obstacle(BACKENDS[backend], call)
    if reason is None:
        assert choose(call, backend).backend is BACKENDS[backend]
    else:
        with pytest.raises(UsageError) as error:
            choose(call, backend)
        assert backend in str(error.value) and reason in str(error.value)


def test_the_backends_and_the_order_in_which_they_are_tried():
    ours = ("dot-scaled", "scaled-mm", "triton-fp8", "bf16-decode")
    assert tuple(name for name in ON_GPU if name in ours) == ours and BACKENDS["cpu"] is cpu.CPU
    assert all(backend.name == name for name, backend in BACKENDS.items())
    assert [name for name in (*ours, "cpu") if BACKENDS[name].few_rows] == ["bf16-decode", "cpu"]


class NoKernels(MXFP4Format):
    """A format of one's own, as `Format` offers it: no device functions."""

    name = "no-kernels"
    kernel_id = None


@dataclasses.dataclass(frozen=True)
class Private(Transform):
    """A transform of one's own that the GPU quantizer cannot do."""

    kind = "private"
    kernel = None


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(NoKernels()), "no-kernels has no GPU kernels"),
        (Scheme(MXFP4Format(), Private()), "the transform private has no GPU kernel"),
    ],
)
def test_formats_and_transforms_without_kernels_run_on_the_cpu_only(scheme, words):
    for machine in (HOPPER, BLACKWELL, AMPERE):
        for backend in ON_GPU:
            assert obstacle(BACKENDS[backend], Call(scheme, *WAN, TENSOR, machine)) == words
        with pytest.raises(UsageError, match=words):
            choose(Call(scheme, *WAN, TENSOR, machine), None)
    assert choose(Call(scheme, *WAN, TENSOR, CPU), None).backend is cpu.CPU


@pytest.mark.parametrize("machine", [VOLTA, Machine("cuda", (9, 0), False)])
def test_no_backend_at_all_is_an_error_with_every_reason(machine):
    with pytest.raises(UsageError, match="No backend can run") as error:
        choose(Call(MXFP4, *WAN, TENSOR, machine), None)
    assert "bf16-decode" in str(error.value)


def test_preview_for_doctor():
    assert backends.preview(HOPPER)["mxfp4"].startswith("scaled-mm: ")
    assert backends.preview(HOPPER)["hif4"].startswith("bf16-decode: ")
    assert "No backend" in backends.preview(VOLTA)["mxfp4"]
    backends.use_backend("scaled-mm")
    assert backends.preview(ADA)["mxfp4"] == "scaled-mm: asked for"
    assert "exact in bfloat16 only" in backends.preview(ADA)["hif4"]


def test_doctor_advises_by_what_the_recipes_run_on():
    for machine in (HOPPER, BLACKWELL):
        assert backends.advice(machine).startswith("mxfp4 or hif4-fast for speed")
    for machine in (AMPERE, CPU):
        assert backends.advice(machine) == "hif4 for quality; no recipe is faster than another here"


def make_layer(name="mxfp4", smooth=True, k=128, n=48):
    generator = torch.Generator().manual_seed(0)
    codes = formats.get(name).quantize(torch.randn(n, k, generator=generator))
    vector = (torch.rand(k, generator=generator) + 0.5).bfloat16() if smooth else None
    scheme = Scheme.of(name, transform="smoothed" if smooth else "hadamard", block=32)
    return QuantLinear.from_codes(codes, scheme, torch.randn(n, generator=generator), vector)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
def test_cpu_equals_the_fake_quant_reference(name, dtype, smooth):
    layer = make_layer(name, smooth)
    x = torch.randn(2, 9, 128, dtype=dtype)
    weight = formats.get(name).dequantize(layer.codes()).double()
    expected = layer.scheme.quantize_input(x, layer.basis).double() @ weight.T + layer.bias.double()
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
    with pytest.raises(UsageError, match=r"PTQ_BACKEND names the backend 'fast'; choose one of .*triton-fp8"):
        layer(x)
    with pytest.raises(UsageError, match="--backend"):
        backends.use_backend("fast")


def test_choice_is_reported_once(monkeypatch):
    lines = []
    monkeypatch.setattr(ui, "info", lines.append)
    backends.tell_once.cache_clear()
    layer, x = make_layer(), torch.randn(3, 128)
    with backends.unreported():
        layer(x)
    assert lines == []
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
    torch.library.opcheck(ops.linear_op, (torch.randn(2, 3, 128), *tensors, "mxfp4 smoothed 32 floor"))
    assert layer.scheme.key == "mxfp4 smoothed 32 floor"


def test_the_operator_computes_what_the_layer_does():
    layer, x = make_layer(), torch.randn(2, 3, 128)
    tensors = (layer.weight_packed, layer.weight_scale, layer.bias, layer.smooth)
    assert torch.equal(ops.linear_op(x, *tensors, layer.scheme.key), layer(x))


def test_placement_follows_the_codes():
    layer = make_layer()
    first = ops.placement_of(layer.packed)
    assert ops.placement_of(layer.packed) is first
    with torch.no_grad():
        layer.weight_scale[0, 0] += 40
    assert ops.placement_of(layer.packed).kind != first.kind
    assert ops.placement_of(make_layer("hif4").packed) is DECODED


def test_placement_follows_storage_put_behind_a_parameter():
    layer, other = make_layer(), make_layer()
    first = ops.placement_of(layer.packed)
    with torch.no_grad():
        other.weight_scale[0, 0] += 40
    layer.weight_scale.data = other.weight_scale.data
    assert ops.placement_of(layer.packed).kind != first.kind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("rows", [1, 7, 63, 512, 2080])
def test_gpu_equals_the_cpu(backend, name, rows):
    layer = make_layer(name, k=1024, n=256)
    x = torch.randn(rows, 1024).bfloat16()
    expected = layer(x.float())
    backends.use_backend(backend)
    on_gpu, x_gpu = layer.to("cuda"), x.to("cuda")
    machine = backends.machine_of(x_gpu.device)
    call = Call(layer.scheme, rows, 256, 1024, ops.placement_of(on_gpu.packed), machine)
    if obstacle(BACKENDS[backend], call):
        with pytest.raises(UsageError):
            on_gpu(x_gpu)
        return
    error = (on_gpu(x_gpu).float().cpu() - expected).abs().max() / expected.abs().max()
    assert error < 6e-3  # bfloat16 output and, on FP8 units, about 14 bits of accumulator


def test_a_transform_that_changes_inputs_its_own_way_has_no_gpu_kernel_unless_it_says_so() -> None:
    class Flipped(Hadamard):
        kind = "flipped"

        def input(self, x, basis):
            return -x

    scheme = Scheme(formats.get("mxfp4"), Flipped(64))
    call = Call(scheme, 1000, 64, 64, DECODED, HOPPER)
    assert obstacle(BACKENDS["bf16-decode"], call) == "the transform flipped has no GPU kernel"


def test_doctor_says_what_each_recipe_is_for():
    facts = machine_facts()
    for name, recipe in installed_recipes().items():
        assert facts[f"recipe {name}"] == recipe.description != ""
    assert "23 % more denoiser error than hif4" in facts["recipe hif4-fast"] and "backend for hif4-fast" in facts
    assert backends.preview(HOPPER)["hif4-fast"].startswith(backends.preview(HOPPER)["mxfp4"].split(":")[0])
