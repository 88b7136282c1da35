"""A number format and a transform of one's own: registered by name, and nothing else touched, they go the whole way.

What layers compute is checked against numpy code that shares nothing with the package.
"""

import contextlib
import copy
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from quantization_helpers import edit_weights, make_records, run
from torch import nn

import ptq
from ptq import known as known_names
from ptq.checkpoint.export import export_component
from ptq.checkpoint.manifest import read_manifest, verify_files
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.shards import ShardSet
from ptq.config import Recipe, load_recipe
from ptq.config.recipe import SchemeSettings, SolverSettings
from ptq.errors import PtqError, UsageError
from ptq.quantization.settings import QuantizeSettings
from ptq.report.method import describe_method
from ptq.runtime import QuantLinear, backends, ops
from ptq.scheme import FORMATS, TRANSFORMS, Format, FormatError, Scheme, Transform, register_format, register_transform
from ptq.scheme.placement import DECODED
from ptq.scheme.tensors import with_sign
from ptq.store.files import read_json
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline

GROUP = 16
NAN_SCALE = 0xFF


class Int4(Format):
    """Signed integers -7 to 7 with a power-of-two scale a group of 16."""

    name = "int4-g16"
    title = "Int4"
    description = "Int4: groups of 16 values share one power-of-two scale; each value is an integer from -7 to 7. 4.5 bits a value."
    group_size = GROUP
    bits_per_value = 4.5
    scale_dtype = torch.uint8
    scale_layout = "pow2-u8"
    scale_rules = ("fit", "tight")  # nothing is clipped; half of that step
    ties_options = ("even",)

    def steps(self, scales):
        step = torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.int() - 127)
        return torch.where(scales == NAN_SCALE, torch.nan, step).repeat_interleave(GROUP, dim=-1)

    def levels(self, elements):
        return (elements & 7).float() * torch.where(elements > 7, -1.0, 1.0)

    def encode(self, x, steps):
        return with_sign((x / steps).abs().nan_to_num(0.0).round().clamp(max=7).to(torch.uint8), x)

    def quantize_columns(self, x_gn, rule, ties):
        largest = x_gn.abs().amax(0)
        mantissa, exponent = torch.frexp(largest / 7)
        exponent = exponent - (mantissa == 0.5).int() - int(rule == "tight")
        scales = torch.where(largest == 0, 0, (exponent + 127).clamp(0, 254))
        scales = torch.where(largest.isfinite(), scales, NAN_SCALE).to(torch.uint8)
        return self.encode(x_gn, self.steps(scales.unsqueeze(-1)).T), scales


class Sorted(Transform):
    """Channels ordered by size, over the whole width or within blocks, so that a group holds channels of like size."""

    kind = "sorted"
    title = "Sorted channels"
    tensor = "order"
    description = "Channels are sorted by their root mean square in blocks of {block} (0: all)."
    needs_records = True
    kernel = None

    def check(self, group_size):
        if self.block % group_size:
            raise FormatError(f"Blocks of {self.block} channels do not hold whole groups of {group_size}.")

    def stored(self, k):
        return (k,), torch.int16

    def input(self, x, basis):
        return x[..., basis.long()]

    def weight(self, w_nk, basis):
        return w_nk.float()[:, basis.long()]

    def restore(self, w_nk, basis):
        return w_nk[:, basis.long().argsort()]

    def hessian(self, h_kk, basis):
        return h_kk[basis.long()][:, basis.long()]

    def candidates(self, weights, h_kk, rms_k, exponents):
        order_bk = rms_k.view(-1, self.block or len(rms_k)).argsort(dim=-1)
        order_bk = order_bk + order_bk.shape[1] * torch.arange(len(order_bk)).unsqueeze(-1)
        return super().candidates(weights, h_kk, rms_k, exponents) | {"sorted": order_bk.flatten().to(torch.int16)}

    def plain(self, k, device=None):
        return torch.arange(k, dtype=torch.int16, device=device)


@contextlib.contextmanager
def registered(*, fmt: bool = True, transform: bool = True) -> Iterator[None]:
    """Both are known inside, and forgotten afterwards."""
    if fmt:
        register_format(Int4())
    if transform:
        register_transform(Sorted)
    try:
        yield
    finally:
        for formats in (FORMATS, known_names.FORMATS):
            formats.pop(Int4.name, None)
        for transforms in (TRANSFORMS, known_names.TRANSFORMS):
            transforms.pop(Sorted.kind, None)
        Scheme.from_key.cache_clear()


@pytest.fixture
def known() -> Iterator[None]:
    with registered():
        yield


def recipe(block: int = 0, rule: str | None = None, **solver) -> Recipe:
    settings = SchemeSettings(transform=Sorted.kind, block=block, input_rule=rule)
    return Recipe(scheme=settings, solver=SolverSettings(**solver))


# The same numerics once more, in numpy.


def grid_steps(x: np.ndarray, rule: str) -> np.ndarray:
    """The step of each value [..., K]: the power of two under which the group's maximum is at most 7, or half of it."""
    largest = np.abs(x.reshape(*x.shape[:-1], -1, GROUP)).max(-1)
    step = np.exp2(np.ceil(np.log2(np.where(largest == 0, 1, largest) / 7)))
    return np.repeat(step / 2 if rule == "tight" else step, GROUP, axis=-1)


def on_grid(x: np.ndarray, rule: str) -> np.ndarray:
    step = grid_steps(x, rule)
    return np.clip(np.rint(x / step), -7, 7) * step


def computed(layer: QuantLinear, x: torch.Tensor, rule: str) -> np.ndarray:
    """What a layer must give for x [T, K], from its stored bytes."""
    packed, order = layer.weight_packed.numpy(), layer.order.numpy().astype(np.int64)
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float64)
    step = np.repeat(np.exp2(layer.weight_scale.numpy().astype(np.float64) - 127), GROUP, axis=-1)
    weight = np.where(nibbles > 7, 8 - nibbles, nibbles) * step
    return on_grid(x.double().numpy()[:, order], rule) @ weight.T + layer.bias.double().numpy()


# A small model of anybody's.


class Uneven(nn.Module):
    """Two Linears behind one input whose channels differ in size, and one behind them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 48)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], -1).tanh())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Uneven().eval()


def uneven(tokens: int, seed: int = 0) -> torch.Tensor:
    """Correlated channels, every fourth of which is six times larger than the others."""
    mixing = torch.randn(16, 64, generator=torch.Generator().manual_seed(7)) / 4
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=generator) @ mixing + torch.randn(tokens, 64, generator=generator) / 4
    return x * torch.where(torch.arange(64) % 4 == 0, 6.0, 1.0)


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("rule", ["fit", "tight"])
@torch.no_grad()
def test_a_module_computes_what_the_definition_says(known, model, block, rule):
    quantized, x = copy.deepcopy(model), uneven(120)
    report = ptq.quantize_module(quantized, [{"x": x}], Int4.name, recipe(block, rule))
    assert [layer.name for layer in report.layers] == ["a", "b", "c"] and not report.skipped
    assert report.layers[0].shares_input_with == ("a", "b")
    for layer in report.layers[:2]:
        found, original = quantized.get_submodule(layer.name), model.get_submodule(layer.name)
        rms = x.double().square().mean(0).reshape(-1, block or 64)
        order = (rms.argsort(-1) + torch.arange(0, 64, block or 64).unsqueeze(-1)).flatten()
        assert layer.stats["basis"] == "sorted" and torch.equal(found.order, order.to(torch.int16))
        # Plain rounding of the weight, in the basis and back.
        weight = on_grid(original.weight.double().numpy()[:, order], "fit")
        assert np.array_equal(found.dequantize().numpy()[:, order], weight)
        y = uneven(40, seed=1)
        np.testing.assert_allclose(found(y).numpy(), computed(found, y, rule), rtol=1e-4, atol=1e-4)
        expected = (y.double() @ original.weight.double().T + original.bias.double()).numpy()
        error = np.square(computed(found, x, rule) - (x @ original.weight.T + original.bias).numpy()).sum()
        signal = float((x @ original.weight.T).square().sum())
        assert layer.stats["output_error"] == pytest.approx(error / signal, rel=0.02)
        assert np.square(found(y).numpy() - expected).sum() < 0.1 * np.square(expected).sum()
    state = quantized.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items() if name.startswith("a.")} == {
        "a.weight_packed": ((32, 32), torch.uint8),
        "a.weight_scale": ((32, 4), torch.uint8),
        "a.bias": ((32,), torch.float32),
        "a.order": ((64,), torch.int16),
    }


@torch.no_grad()
def test_gptq_rounds_on_the_formats_grid_and_lowers_the_error(known, model):
    x, errors = uneven(120), {}
    for rounding in ("rtn", "gptq"):
        quantized = copy.deepcopy(model)
        report = ptq.quantize_module(quantized, [{"x": x}], Int4.name, recipe(rounding=rounding))
        for layer in report.layers[:2]:
            found, original = quantized.get_submodule(layer.name), model.get_submodule(layer.name)
            order = found.order.long()
            w = original.weight.double()[:, order].numpy()
            wq = found.dequantize().double()[:, order].numpy()
            step = grid_steps(w, "fit")  # scales are those of plain rounding, values whole multiples
            assert np.array_equal(wq / step, np.clip(np.rint(wq / step), -7, 7))
            assert np.array_equal(2.0 ** (found.weight_scale.double().numpy() - 127), step[:, ::GROUP])
            y = x.double().numpy()[:, order]
            errors[rounding, layer.name] = np.square(y @ (wq - w).T).sum() / np.square(y @ w.T).sum()
        if rounding == "gptq":
            traces = {layer.name: layer.stats["trace_error"] for layer in report.layers[:2]}
            assert traces == pytest.approx({name: errors["gptq", name] for name in traces}, rel=1e-3)
    assert all(errors["gptq", name] < 0.8 * errors["rtn", name] for name in ("a", "b"))


def test_a_nan_group_and_an_empty_group_are_kept_apart(known):
    x = torch.randn(2, 48)
    x[0, 3], x[1, 16:32] = torch.nan, 0.0
    values = ptq.formats.get(Int4.name).fake_quantize(x)
    assert values[0, :16].isnan().all() and not values[0, 16:].isnan().any() and not values[1, 16:32].any()


def test_the_operator_runs_it_on_the_cpu_and_no_gpu_backend_offers_to(known, model):
    quantized, x = copy.deepcopy(model), uneven(80)
    ptq.quantize_module(quantized, [{"x": x}], Int4.name, recipe())
    layer = quantized.a
    direct, packed = layer(x), layer.packed
    key = packed.scheme.key
    assert Scheme.from_key(key) == packed.scheme and copy.deepcopy(packed.scheme) == packed.scheme
    assert torch.equal(direct, ops.linear_op(x, packed.codes, packed.scales, packed.bias, packed.basis, key))
    assert torch.equal(direct, torch.compile(layer, backend="eager")(x))
    hopper = backends.Machine("cuda", (9, 0), True)
    for fmt, transform, reason in (
        (Int4.name, "none", "int4-g16 has no GPU kernels"),
        ("hif4", "sorted", "sorted has"),
    ):
        scheme = Scheme.of(fmt, transform=transform)
        with pytest.raises(UsageError, match=f"No backend can run {fmt} layers.*{reason}"):
            backends.choose(backends.Call(scheme, 512, 64, 64, DECODED, hopper), None)
    assert backends.preview(hopper)[Int4.name].startswith("No backend can run")
    assert backends.preview(backends.Machine("cpu", (0, 0), True))[Int4.name].startswith("cpu: ")


def test_a_search_of_scales_that_the_format_does_not_have_is_refused(known, model):
    linears = dict(model.named_children())
    for rounding in ("rtn", "gptq"):
        with pytest.raises(PtqError, match=r"Int4 has no search of weight scales: set solver\.clip_search to false"):
            settings = recipe(rounding=rounding, clip_search=True)
            ptq.quantize_module(model, [{"x": uneven(64)}], Int4.name, settings)
    assert dict(model.named_children()) == linears


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("scheme.input_rule=even",), r"int4-g16 has no scale rule 'even'; choose one of fit, tight"),
        (("scheme.transform=sorted", "scheme.block=24"), "Blocks of 24 channels do not hold whole groups of 16"),
        (("scheme.transform=shuffled",), "Unknown transform 'shuffled'; choose one of .*sorted"),
    ],
)
def test_what_does_not_fit_together_is_refused(known, model, overrides, message):
    with pytest.raises(PtqError, match=message):
        ptq.quantize_module(model, [{"x": uneven(64)}], Int4.name, load_recipe("rtn", Int4.name, overrides))
    assert type(model.a) is nn.Linear


@pytest.mark.parametrize("base", ["hadamard", "smoothed", "learned"])
def test_a_transform_derived_from_another_keeps_its_own_name(base):
    derived = type("Derived", (TRANSFORMS[base],), {"kind": "derived"})
    register_transform(derived)
    try:
        scheme = Scheme.of("hif4", transform="derived", block=64)
        assert (
            Scheme.from_config(scheme.to_config(), "config.json")
            == scheme
            != Scheme.of("hif4", transform=base, block=64)
        )
        assert scheme.to_config()["transform"] == {"type": "derived", "block_size": 64, "smooth": False}
        assert Scheme.from_key(scheme.key) == scheme
    finally:
        del TRANSFORMS["derived"], known_names.TRANSFORMS["derived"]
        Scheme.from_key.cache_clear()


def test_names_are_taken_once(known):
    with pytest.raises(FormatError, match="There is a format 'int4-g16' already"):
        register_format(Int4())
    with pytest.raises(FormatError, match="There is a transform 'sorted' already"):
        register_transform(type("Other", (Transform,), {"kind": "sorted"}))


# A Wan pipeline, from records to a checkpoint that diffusers loads.


@pytest.fixture(scope="module")
def pipeline(single, tmp_path_factory):
    """The cheapest pipeline with some channels of each block's feed-forward made large, and its records."""
    root = tmp_path_factory.mktemp("extending")
    path = shutil.copytree(single, root / "model")

    def plant(tensors):
        for index in range(2):
            for key in ("weight", "bias"):
                tensors[f"blocks.{index}.ffn.net.0.proj.{key}"][::5] *= 30

    edit_weights(path, "transformer", plant)
    return path, make_records(path, root / "records", prompts=2).directory


@pytest.fixture(scope="module")
def checkpoint(pipeline, tmp_path_factory):
    """Int4, sorted channels, GPTQ; the second input rule."""
    out = tmp_path_factory.mktemp("packed") / "int4"
    with registered():
        run(*pipeline, out, settings())
    return out


def settings(**solver) -> QuantizeSettings:
    return QuantizeSettings(Int4.name, recipe(rule="tight", **{"rounding": "gptq"} | solver), "mine", {})


def test_the_manifest_of_a_pipeline_names_and_measures_it(known, pipeline, checkpoint):
    manifest = verify_files(checkpoint)
    assert (manifest.format, manifest.recipe, manifest.recipe_name) == (Int4.name, settings().recipe, "mine")
    assert len(manifest.layers) == 2 * 10 and {row.basis for row in manifest.layers} == {"off", "sorted"}
    for row in manifest.layers:
        assert row.basis_errors.keys() == {"off", "sorted"} and row.trace_error <= row.trace_error_rtn
        assert row.basis == min(row.basis_errors, key=row.basis_errors.get)
        assert (row.basis == "sorted") >= (row.layer == "ffn.net.2")
    entries = ShardSet(checkpoint / "transformer").entries
    packed = sum(e.nbytes for e in entries.values() if e.name.endswith((".weight_packed", ".weight_scale")))
    basis = sum(e.nbytes for e in entries.values() if e.name.endswith(".order"))
    assert (manifest.coverage.quantized_bytes, manifest.coverage.basis_bytes) == (packed, basis) and basis > 0
    assert manifest.coverage.bits_per_quantized_value == 4.5
    steps = {step.title: step.text for step in describe_method(manifest)}
    assert steps["Number format"].startswith(Int4.description)
    assert "Channels are sorted by their root mean square in blocks of 0" in steps["Sorted channels"]


def test_diffusers_loads_and_runs_the_checkpoint(known, pipeline, checkpoint):
    config = read_json(checkpoint / "transformer/config.json")["quantization_config"]
    assert config["format"] == Int4.name and config["input_activations"]["scale_rule"] == "tight"
    scheme = Scheme.of(Int4.name, transform=Sorted.kind, input_rule="tight")
    assert PackedConfig.parse(config).scheme == scheme
    model = WanTransformer3DModel.from_pretrained(checkpoint / "transformer", dtype=torch.float32)
    original = load_pipeline(pipeline[0]).transformer
    rows = {f"blocks.{row.block}.{row.layer}": row for row in read_manifest(checkpoint).layers}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert layers.keys() == rows.keys()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, layer in layers.items():
        assert layer.scheme == scheme and layer.order.dtype == torch.int16
        layer.register_forward_hook(lambda _m, args, y, name=name: seen.update({name: (args[0], y)}))
        # The weight is the original's to the precision of the grid.
        w, wq = original.get_submodule(name).weight.detach().float(), layer.dequantize()
        assert 5 < 10 * torch.log10(w.square().sum() / (w - wq).square().sum()) < 30
    generator = torch.Generator().manual_seed(0)
    channels, text = model.config.in_channels, model.config.text_dim
    inputs = [torch.randn(shape, generator=generator) for shape in ((1, channels, 2, 4, 4), (1, 16, text))]
    with torch.no_grad():
        outputs = [m(inputs[0], torch.tensor([700.0]), inputs[1], return_dict=False)[0] for m in (original, model)]
    assert 0 < (outputs[1] - outputs[0]).norm() < 0.5 * outputs[0].norm()
    assert seen.keys() == layers.keys()
    for name, (x, y) in seen.items():  # every layer, inside the running model
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        expected = computed(layers[name], x, "tight")
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_whole_pipeline_generates_with_it(known, checkpoint):
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
    frames = load_pipeline(checkpoint)("a ball", negative_prompt="bad", output_type="latent", **size).frames
    assert torch.isfinite(frames).all()


def test_without_gptq_the_checkpoint_holds_plain_rounding_of_the_sorted_weights(known, pipeline, checkpoint, tmp_path):
    run(*pipeline, tmp_path / "rtn", settings(rounding="rtn"))
    original = load_pipeline(pipeline[0]).transformer
    for name, layer in load_pipeline(tmp_path / "rtn").transformer.named_modules():
        if isinstance(layer, QuantLinear):
            order = layer.order.long()
            weight = original.get_submodule(name).weight.detach().double()[:, order].numpy()
            assert np.array_equal(layer.dequantize().numpy()[:, order], on_grid(weight, "fit"))
    digests = [read_manifest(path).digest for path in (checkpoint, tmp_path / "rtn")]
    assert digests[0] != digests[1]


def test_it_is_exported_as_dense_bfloat16_only(known, checkpoint, tmp_path):
    export_component(checkpoint / "transformer", tmp_path / "dense", "bf16")
    dense = WanTransformer3DModel.from_pretrained(tmp_path / "dense", dtype=torch.float32).state_dict()
    packed = load_pipeline(checkpoint).transformer
    for name, layer in packed.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(dense[f"{name}.weight"], layer.dequantize().bfloat16().float())
    with pytest.raises(UsageError, match="compressed-tensors takes mxfp4 checkpoints, this one is int4-g16"):
        export_component(checkpoint / "transformer", tmp_path / "other", "compressed-tensors")


def test_a_pipeline_refuses_a_search_of_scales_before_any_work(known, pipeline, tmp_path):
    with pytest.raises(PtqError, match=r"Int4 has no search of weight scales: set solver\.clip_search to false"):
        run(*pipeline, tmp_path / "out", settings(clip_search=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("known_parts", "message"),
    [
        ({"fmt": False, "transform": False}, r"config\.json.*Unknown format 'int4-g16'; choose one of mxfp4, hif4"),
        ({"transform": False}, r"config\.json.*Unknown transform 'sorted'; choose one of none"),
    ],
)
def test_without_registration_the_checkpoint_is_refused_by_name(checkpoint, known_parts, message):
    with registered(**{"fmt": True, "transform": True} | known_parts):
        with pytest.raises(PtqError, match=message):
            WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
        with pytest.raises(PtqError, match=message):
            load_pipeline(checkpoint)
        with pytest.raises(PtqError, match=message):
            PackedConfig.parse(read_json(checkpoint / "transformer/config.json")["quantization_config"])
        assert read_layout(checkpoint).is_packed and read_manifest(checkpoint).format == Int4.name
