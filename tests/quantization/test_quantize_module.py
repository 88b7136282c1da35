"""quantize_module on models that have nothing to do with Wan: a BERT encoder and an image diffusion transformer."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from quantization_helpers import FULL
from torch import nn
from transformers import BertConfig, BertModel

import ptq
from ptq import formats
from ptq.config import load_recipe
from ptq.errors import UsageError
from ptq.quantization.shared_inputs import find_shared_inputs
from ptq.runtime import QuantLinear
from ptq.solvers import SolverError


def recipe(fmt, *overrides):
    return load_recipe("rtn", fmt, overrides)


@pytest.fixture(scope="module")
def bert():
    """Model, batches to calibrate with, and one held-out batch. A few embedding channels are outliers."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=99
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        model.embeddings.LayerNorm.weight[::17] *= 12
    batches = [{"input_ids": torch.randint(0, 99, (4, 24))} for _ in range(5)]
    return model, batches[:4], batches[4]


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    batches = [
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([10 * i, 900]),
            "class_labels": torch.arange(2),
        }
        for i in range(1, 5)
    ]
    return model, batches[:3], batches[3]


def output(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def error(model, reference, batch):
    expected = output(reference, batch)
    return float((output(model, batch) - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("fmt", ["hif4", "mxfp4"])
@pytest.mark.parametrize("name", ["bert", "dit"])
def test_packed_close_to_the_original_and_better_than_plain_rounding(name, fmt, request):
    model, batches, held_out = request.getfixturevalue(name)
    errors = {}
    for key, overrides in (("rtn", ()), ("full", FULL)):
        quantized = copy.deepcopy(model).train()
        report = ptq.quantize_module(quantized, batches, format=fmt, recipe=recipe(fmt, *overrides))
        assert all(module.training for module in quantized.modules() if not isinstance(module, QuantLinear))
        errors[key] = error(quantized.eval(), model, held_out)
    assert 0 < errors["full"] < 0.75 * errors["rtn"] < 0.05
    state = quantized.state_dict()
    spec = formats.get(fmt)
    for layer in report.layers:
        n, k = layer.shape
        assert state[f"{layer.name}.weight_packed"].shape == (n, k // 2)
        assert state[f"{layer.name}.weight_packed"].dtype == torch.uint8
        assert state[f"{layer.name}.weight_scale"].dtype == spec.scale_dtype
        assert state[f"{layer.name}.smooth"].dtype == torch.bfloat16 and f"{layer.name}.weight" not in state
        assert layer.stats["trace_error"] <= layer.stats["trace_error_rtn"] and layer.tokens > 0
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {layer.name for layer in report.layers} | set(report.skipped) == linears
    assert report.quantized_parameters == sum(model.get_submodule(x.name).weight.numel() for x in report.layers)


def test_plain_rounding_is_the_formats_own_and_needs_no_hessian(bert, monkeypatch):
    model, batches, _ = bert
    monkeypatch.setattr(torch.Tensor, "addmm_", None)  # how Hessians are accumulated
    quantized = copy.deepcopy(model)
    report = ptq.quantize_module(quantized, iter(batches), "hif4", "rtn")
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        module = quantized.get_submodule(layer.name)
        assert torch.equal(module.dequantize(), formats.get("hif4").fake_quantize(weight))
        assert torch.equal(module.bias, model.get_submodule(layer.name).bias)
        assert "trace_error" not in layer.stats and layer.stats["output_error"] == layer.stats["output_error_rtn"]


def test_linears_of_one_tensor_share_an_input(bert):
    model, batches, _ = bert
    report = ptq.quantize_module(copy.deepcopy(model), batches, "hif4", recipe("hif4", *FULL))
    by_name = {layer.name: layer for layer in report.layers}
    attention = "encoder.layer.0.attention.self."
    trio = tuple(attention + part for part in ("query", "key", "value"))
    assert all(by_name[name].shares_input_with == trio for name in trio)
    alone = "encoder.layer.0.intermediate.dense"
    assert by_name[alone].shares_input_with == (alone,) and by_name[alone].tokens == 4 * 4 * 24
    assert report.skipped == {}


def test_equal_values_in_other_tensors_are_not_shared():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x, swap):
            first = self.a(x) + self.b(x.clone())
            y = x * 2
            return first + self.c(y) + self.d(x if swap else y)

    model = Twins()
    linears = dict(model.named_children())
    x = torch.randn(3, 64)
    shared, _ = find_shared_inputs(linears, lambda: model(x=x, swap=False))
    assert [group.names for group in shared] == [("a",), ("b",), ("c", "d")]
    mixed, _ = find_shared_inputs(linears, lambda: (model(x=x, swap=False), model(x=x, swap=True)))
    assert [group.names for group in mixed] == [("a",), ("b",), ("c",), ("d",)]


def test_little_memory_means_more_passes_and_the_same_codes(bert):
    model, batches, _ = bert
    results = []
    for limit in (2**32, 400_000, 0):
        quantized = copy.deepcopy(model)
        report = ptq.quantize_module(quantized, batches, "mxfp4", recipe("mxfp4", *FULL), statistics_bytes=limit)
        results.append((report.passes, quantized.state_dict()))
    groups = len({layer.shares_input_with for layer in report.layers})
    assert [passes for passes, _ in results][::2] == [1, groups] and 1 < results[1][0] < groups
    for _, state in results[1:]:
        assert all(torch.equal(state[key], value) for key, value in results[0][1].items())


class Awkward(nn.Module):
    """Linears that cannot, or must not, be replaced."""

    def __init__(self):
        super().__init__()
        self.good = nn.Linear(64, 64)
        self.narrow = nn.Linear(40, 64)
        self.unused = nn.Linear(64, 64)
        self.embedding = nn.Embedding(64, 64)
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(64, 2)
        self.alias = self.shared = nn.Linear(64, 64)

    def forward(self, x):
        y = self.good(x) + self.tied(x) + self.shared(x) + self.narrow(x[..., :40])
        return self.attention(y, y, y)[0]


def test_what_is_skipped_and_why():
    model, x = Awkward(), torch.randn(6, 64)
    report = ptq.quantize_module(model, [{"x": x}], "mxfp4", "rtn")
    assert [layer.name for layer in report.layers] == ["good"]
    assert report.skipped == {
        "narrow": "K = 40 is not a multiple of 32",
        "unused": "the batches never reach it",
        "tied": "its weight is also embedding.weight",
        "attention.out_proj": "it is a NonDynamicallyQuantizableLinear, whose owner may read its weight directly",
        "alias": "the same module is also shared",
        "shared": "the same module is also alias",
        "attention": "it is no nn.Linear but a MultiheadAttention with its own in_proj_weight [192, 64]",
    }
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "There are no batches"),
        ({"batches": [torch.zeros(1, 64)]}, "Batch 0 is a Tensor"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["good", "missing"]}, r"'missing' does not exist.*Its Linears are good"),
        ({"targets": ["embedding"]}, "'embedding' is a Embedding"),
        ({"targets": ["narrow"]}, r"narrow cannot be quantized: K = 40 is not a multiple of 32"),
        ({"targets": ["good", "unused"]}, "never reach unused"),
        ({"recipe": "no-such-recipe"}, "no recipe"),
        ({"recipe": load_recipe("hif4", "hif4")}, "made for hif4"),
    ],
)
def test_bad_requests_leave_the_model_alone(arguments, message):
    model = Awkward()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(UsageError, match=message):
        ptq.quantize_module(
            model, **{"batches": [{"x": torch.randn(6, 64)}], "format": "mxfp4", "recipe": "rtn"} | arguments
        )
    assert {name: id(module) for name, module in model.named_modules()} == before and model.training


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(UsageError, match=r"No Linear of Sequential .*0: K = 40"):
        ptq.quantize_module(nn.Sequential(nn.Linear(40, 8)), [{"input": torch.zeros(2, 40)}], "hif4", "rtn")


def test_a_failure_half_way_puts_every_linear_back():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    linears = list(model)
    with torch.no_grad():
        model[1].weight[3, 5] = torch.nan
    with pytest.raises(SolverError, match=r"^1: .*NaN"):
        ptq.quantize_module(model, [{"input": torch.randn(4, 64)}], "mxfp4", "rtn")
    assert list(model) == linears


def test_inputs_changed_in_place_are_not_shared_in_inference_mode():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            y = self.a(x)
            x.mul_(100.0)
            return y + self.b(x)

    model = InPlace()
    with torch.inference_mode():
        groups, _ = find_shared_inputs(dict(model.named_children()), lambda: model(torch.randn(3, 64)))
    assert [group.names for group in groups] == [("a",), ("b",)]


def test_a_lone_linear_is_refused_in_whole_sentences():
    with pytest.raises(UsageError, match=r"No Linear of Linear can be quantized to hif4: it is the whole model, "):
        ptq.quantize_module(nn.Linear(64, 64), [{"input": torch.randn(4, 64)}], format="hif4")


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_fast_path_does_not_read_the_weight(norm_first):
    """nn.TransformerEncoderLayer in eval mode hands its Linears' weights to one fused kernel, unless one of them objects."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(4, 16, 64), torch.zeros(4, 16, dtype=torch.bool)
    with torch.no_grad():
        expected = model(x)
        report = ptq.quantize_module(model, [{"src": x}], "mxfp4")
        assert [one.name for one in report.layers] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        found, masked = model(x), model(x, src_key_padding_mask=mask)
    error = (found - expected).square().sum() / expected.square().sum()
    assert 1e-5 < error < 0.01
    torch.testing.assert_close(masked, found)
    with pytest.raises(UsageError, match="quantized already"):
        ptq.quantize_module(model, [{"src": x}], "mxfp4", targets=["layers.0.linear1"])
