"""`--compile`: blocks of a packed pipeline are traced whole and once; what it cannot go with is refused."""

from dataclasses import replace

import pytest
import torch
from generation_helpers import SETTINGS, load

from ptq.errors import UsageError
from ptq.generation import Settings, check_compile, sampling
from ptq.generation.sampling import Sampler
from ptq.runtime import QuantLinear
from ptq.scheme import Scheme

SCHEME = Scheme.of("mxfp4", transform="learned", block=32)


def pack(model):
    scheme = Scheme.of("mxfp4", transform="learned", block=32)  # one a model, as when it is loaded
    for name, linear in list(model.blocks.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            k = linear.in_features
            basis = SCHEME.transform.plain(k)
            codes = SCHEME.format.quantize(SCHEME.transform.weight(linear.weight.detach(), basis))
            bias = None if linear.bias is None else linear.bias.detach()
            model.blocks.set_submodule(name, QuantLinear.from_codes(codes, scheme, bias, basis))


def test_blocks_compile_whole_and_once_for_steps_experts_and_prompts(pipe_dir, monkeypatch):
    load.cache_clear()
    pipe = load(str(pipe_dir))
    try:
        for expert in (pipe.transformer, pipe.transformer_2):
            pack(expert)
        plain = Sampler(pipe, SETTINGS).make("a red ball", 3, None, lambda step: None)
        monkeypatch.setattr(sampling, "COMPILER", "eager")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        sampler = Sampler(pipe, replace(SETTINGS, compile=True))
        first = sampler.make("a red ball", 3, None, lambda step: None)
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            sampler.make("quite another prompt, and a longer one", 4, None, lambda step: None)
        assert torch.equal(first.latents, plain.latents)  # the backend "eager" runs the same operations
        assert counters["stats"]["unique_graphs"] == 1, "experts or blocks were traced again"
    finally:
        load.cache_clear()
        torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "device", "offload", "words"),
    [
        ({}, "cpu", "none", "for GPUs"),
        ({}, None, "model", "--offload model"),
        ({"cache": "first-block:0.05", "steps": 12}, "cuda", "none", "--cache first-block:0.05"),
        ({"context_parallel": 2}, "cuda", "none", "--context-parallel 2"),
    ],
)
def test_what_cannot_be_compiled_is_refused(change, device, offload, words):
    with pytest.raises(UsageError, match=words):
        check_compile(replace(SETTINGS, compile=True, **change), device, offload)
    check_compile(replace(SETTINGS, **change), device, offload)


def test_it_is_a_setting_of_the_run_and_earlier_runs_lack_it():
    assert not {"compile", "cache"} & SETTINGS.as_json().keys() and Settings.from_json(SETTINGS.as_json()) == SETTINGS
    compiled = replace(SETTINGS, compile=True)
    assert compiled.as_json()["compile"] is True and Settings.from_json(compiled.as_json()) == compiled
