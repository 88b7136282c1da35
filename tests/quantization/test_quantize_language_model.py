"""quantize_module on decoder language models of transformers: causal masks, cached keys, generation, what is no Linear."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import ptq
from ptq import formats
from ptq.config import load_recipe
from ptq.errors import UsageError
from ptq.runtime import QuantLinear

EXAMPLE = Path(__file__).parents[2] / "examples" / "quantize_language_model.py"
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": None,
}
FORMATS = pytest.mark.parametrize("fmt", ["hif4", "mxfp4"])


@pytest.fixture(scope="module")
def trained():
    """What the example leaves: a Llama trained on sentences (`original`), rows of text (`text`, `unseen`), functions."""
    return runpy.run_path(str(EXAMPLE))


def small(kind=LlamaForCausalLM, config=LlamaConfig, **changes):
    torch.manual_seed(0)
    return kind(config(**SMALL | changes)).eval()


def rows(*shape, seed=1):
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def dense(original, quantized):
    """The original with ordinary float32 Linears in place of the quantized ones: weights decoded, inputs quantized by a hook,
    both in the original basis: y = (fq(x A) A^-1) (W' A^T)^T, with A from the bits that a layer stores.
    """
    model = copy.deepcopy(original).float()
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantLinear):
            fmt, rule, basis = layer.scheme.format, layer.scheme.input_rule, torch.eye(layer.in_features).double()
            if layer.scheme.transform.kind == "learned":
                basis = torch.block_diag(*layer.transform.view(torch.float8_e4m3fn).double() / 256)
            linear = model.get_submodule(name)
            inverse = torch.linalg.inv(basis)
            linear.weight.data = (fmt.dequantize(layer.codes()).double() @ basis.T).float()

            def quantize(_module, inputs, a=basis, inverse=inverse, fmt=fmt, rule=rule):
                found = fmt.fake_quantize((inputs[0].double() @ a).float(), scale_rule=rule)
                return ((found.double() @ inverse).to(inputs[0].dtype),)

            linear.register_forward_pre_hook(quantize)
    return model


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(input_ids=ids, **arguments).logits


@torch.no_grad()
def step_by_step(model, ids, prompt):
    """Logits of every position, computed with cached keys: `prompt` tokens at once, the others one at a time."""
    cache = DynamicCache()
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)


def relative(found, expected):
    return float((found - expected).square().sum() / expected.square().sum())


@FORMATS
@pytest.mark.parametrize("recipe", ["rtn", None], ids=["rtn", "default"])
def test_the_logits_are_those_of_fake_quantized_dense_weights(trained, fmt, recipe):
    original, unseen = trained["original"], trained["unseen"][:6]
    model = copy.deepcopy(original)
    report = ptq.quantize_module(model, trained["batches"], fmt, recipe)
    assert report.skipped == {"lm_head": "its weight is also model.embed_tokens.weight"}
    reference = dense(original, model)
    if recipe == "rtn":
        for layer in report.layers:
            rounded = formats.get(fmt).fake_quantize(original.get_submodule(layer.name).weight.detach())
            assert torch.equal(reference.get_submodule(layer.name).weight, rounded)
    expected = logits(reference, unseen)
    assert relative(logits(model, unseen), expected) < 1e-4 < relative(logits(original, unseen), expected)
    assert relative(step_by_step(model, unseen, 8), expected) < 1e-4


@FORMATS
def test_the_default_recipe_keeps_what_the_model_has_learned(trained, fmt):
    original, unseen = trained["original"], trained["unseen"]
    loss, divergence = trained["loss"], trained["divergence"]
    assert loss(original, unseen) < 1.5  # ln 75 = 4.3 before training; the sentences' own entropy is about 1.2
    found = {}
    for recipe in ("rtn", fmt):
        model = copy.deepcopy(original)
        ptq.quantize_module(model, trained["batches"], fmt, recipe)
        found[recipe] = divergence(original, model, unseen)
        assert abs(loss(model, unseen) - loss(original, unseen)) < 0.03
    assert 0 < found[fmt] < 0.7 * found["rtn"]


@FORMATS
def test_it_generates_with_cached_keys(trained, fmt):
    model = copy.deepcopy(trained["original"])
    ptq.quantize_module(model, trained["batches"], fmt)
    reference = dense(trained["original"], model)
    start = trained["unseen"][:8, :6]
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        written = model.generate(start, attention_mask=torch.ones_like(start), **options, **cache)
        scores = logits(reference, written[:, :-1])[:, 5:]
        scores[..., trained["original"].config.eos_token_id] = -torch.inf  # min_new_tokens forbids the end
        chosen = scores.gather(-1, written[:, 6:, None])
        assert written.shape == (8, 30) and (scores.amax(-1, keepdim=True) - chosen).max() < 0.05  # synonyms are close
    assert sum(map(trained["is_a_sentence"], trained["write"](model, 32))) >= 24


class FreshCache(nn.Module):
    """The model behind a prefix: no object that a call changes comes from outside."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, parts, keys=None):
        cache = DynamicCache(keys)
        return [self.model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts]


def codes(model):
    return {name: layer.packed for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def assert_same_codes(found, expected):
    assert found and found.keys() == expected.keys()
    for name, packed in found.items():
        assert torch.equal(packed.codes, expected[name].codes) and torch.equal(packed.scales, expected[name].scales)


@pytest.mark.parametrize("statistics_bytes", [2**30, 0], ids=["one pass", "many passes"])
def test_a_cache_is_fed_once_however_often_the_batches_run(statistics_bytes):
    original, ids = small(), rows(4, 40)
    with torch.no_grad():
        filled = [original(input_ids=part[:, :24], use_cache=True).past_key_values for part in ids.split(2)]
    keys = [[(layer.keys.clone(), layer.values.clone()) for layer in cache.layers] for cache in filled]
    wrapped = FreshCache(copy.deepcopy(original))
    batches = [{"parts": [part[:, 24:]], "keys": one} for part, one in zip(ids.split(2), keys, strict=True)]
    ptq.quantize_module(wrapped, batches, "mxfp4")
    model = copy.deepcopy(original)
    batches = [{"input_ids": p[:, 24:], "past_key_values": c} for p, c in zip(ids.split(2), filled, strict=True)]
    report = ptq.quantize_module(model, batches, "mxfp4", statistics_bytes=statistics_bytes)
    assert {layer.tokens for layer in report.layers} == {4 * 16}
    assert (report.passes == 1) == bool(statistics_bytes)
    assert [cache.get_seq_length() for cache in filled] == [24, 24]  # the caller's are as they were
    assert_same_codes(codes(model), codes(wrapped.model))


def test_of_a_cache_that_one_batch_fills_the_next_one_reads():
    original, ids = small(), rows(2, 40)
    wrapped = FreshCache(copy.deepcopy(original))
    parts = [ids[:, :24], ids[:, 24:32], ids[:, 32:]]
    ptq.quantize_module(wrapped, [{"parts": parts}], "hif4")
    model, cache = copy.deepcopy(original), DynamicCache()
    report = ptq.quantize_module(model, [{"input_ids": part, "past_key_values": cache} for part in parts], "hif4")
    assert {layer.tokens for layer in report.layers} == {2 * 40} and cache.get_seq_length() == 0
    assert_same_codes(codes(model), codes(wrapped.model))


def test_a_decoder_layer_with_its_rotary_pair_mask_and_cache():
    whole = small()
    layer, positions = whole.model.layers[0], torch.arange(16)[None]
    hidden = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(2))
    batch = {
        "hidden_states": hidden,
        "position_embeddings": whole.model.rotary_emb(hidden, positions),
        "attention_mask": torch.full((16, 16), -torch.inf).triu(1)[None, None],
        "position_ids": positions,
        "past_key_values": DynamicCache(),
    }
    model = copy.deepcopy(layer)
    report = ptq.quantize_module(model, [batch], "mxfp4")
    q = next(one for one in report.layers if one.name == "self_attn.q_proj")
    assert q.shares_input_with == tuple(f"self_attn.{part}_proj" for part in "qkv")
    assert [one.shape for one in report.layers][:3] == [(64, 64), (32, 64), (32, 64)]
    with torch.no_grad():
        found, expected = (one(**copy.deepcopy(batch)) for one in (model, dense(layer, model)))
    assert relative(found, expected) < 1e-6


@FORMATS
def test_bfloat16_models_with_biases_and_a_head_of_their_own(fmt):
    original = small(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=False).bfloat16()
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model = copy.deepcopy(original)
    report = ptq.quantize_module(model, [{"input_ids": rows(4, 32)}], fmt)
    assert report.skipped == {} and report.layers[-1].name == "lm_head"
    found, ids = logits(model, rows(3, 20, seed=5)), rows(3, 20, seed=5)
    assert found.dtype == torch.bfloat16 and model.dtype == torch.bfloat16
    expected = logits(dense(original, model), ids)
    assert relative(found.float(), expected) < 0.02
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (3, 25)


def test_tied_embeddings_stay_tied():
    model = small(tie_word_embeddings=True)
    with pytest.raises(UsageError, match=r"Target lm_head cannot be quantized: its weight is also model.embed_tokens"):
        ptq.quantize_module(model, [{"input_ids": rows(2, 16)}], "hif4", "rtn", targets=["lm_head"])
    ptq.quantize_module(model, [{"input_ids": rows(2, 16)}], "hif4", "rtn")
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_what_is_no_linear_is_named():
    sizes = {"vocab_size": 96, "n_embd": 64, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    batches = [{"input_ids": rows(2, 16)}]
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    kept = dict(model.named_modules())
    with pytest.raises(UsageError) as caught:
        ptq.quantize_module(model, batches, "mxfp4", "rtn")
    assert str(caught.value) == (
        "No Linear of GPT2LMHeadModel can be quantized to mxfp4: lm_head: its weight is also transformer.wte.weight; "
        "transformer.h.0.attn.c_attn: it is no nn.Linear but a Conv1D with its own weight [64, 192]; "
        "transformer.h.0.attn.c_proj: it is no nn.Linear but a Conv1D with its own weight [64, 64]; and 2 more."
    )
    assert dict(model.named_modules()) == kept
    report = ptq.quantize_module(GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False)), batches, "mxfp4")
    assert [layer.name for layer in report.layers] == ["lm_head"]
    assert [name.rpartition(".")[2] for name in report.skipped] == ["c_attn", "c_proj", "c_fc", "c_proj"]
    mixture = small(MixtralForCausalLM, MixtralConfig, num_hidden_layers=1, num_local_experts=4)
    report = ptq.quantize_module(mixture, batches, "mxfp4")
    assert report.skipped == {
        "model.layers.0.mlp.experts": "it is no nn.Linear but a MixtralExperts with its own down_proj [4, 64, 128]"
    }


class Mixture(nn.Module):
    """Two experts, each of which is always called, if need be with no token at all."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x, to):
        return torch.cat([expert(x[to == index]) for index, expert in enumerate(self.experts)])


def test_an_expert_may_get_no_token_in_a_batch():
    batches = [{"x": torch.randn(6, 64), "to": torch.tensor(to)} for to in ([0] * 6, [0, 1, 0, 1, 0, 1])]
    report = ptq.quantize_module(Mixture(), batches, "hif4")
    assert [layer.tokens for layer in report.layers] == [9, 3]
    report = ptq.quantize_module(Mixture(), batches[:1], "hif4")
    assert report.skipped == {"experts.1": "the batches never reach it"}


def test_batches_that_cannot_be_copied_are_refused():
    model = small()
    before = dict(model.named_modules())
    with pytest.raises(
        UsageError, match=r"^Batch 1 cannot be copied \(.*generator.*\). Batches run several times"
    ) as caught:
        batches = [{"input_ids": rows(1, 8)}, {"input_ids": rows(1, 8), "past_key_values": (x for x in ())}]
        ptq.quantize_module(model, batches, "hif4", load_recipe("rtn", "hif4"))
    assert "\n" not in str(caught.value) and dict(model.named_modules()) == before
