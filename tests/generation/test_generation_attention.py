"""`--attention-backend fa3` and `fa3-fp8`: against torch's own attention, in a pipeline, and where they are refused.

The package needs a Hopper GPU. A stand-in of the same signature (stand_in/) takes its place here; what is tested is what the
package is given, and what is made of its result.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from generation_helpers import MODEL, SETTINGS, load

from ptq.errors import UsageError
from ptq.generation import sampling
from ptq.generation.directory import describe_run
from ptq.generation.sampling import Sampler
from ptq.store.run_info import RunPlan
from ptq.wan import attention
from ptq.wan.attention import SLOTS, attend, attend_fp8, attention_facts, check_attention, rounds_more

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The stand-in, installed."""
    place = tmp_path_factory.mktemp("site")
    (place / "fa3_fwd-0.0.3.dist-info").mkdir()
    (place / "fa3_fwd-0.0.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fa3_fwd\nVersion: 0.0.3\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        patch.syspath_prepend(str(STAND_IN))
        import fa3_fwd_interface

        yield fa3_fwd_interface
    sys.modules.pop("fa3_fwd_interface")


def test_without_the_package_there_is_no_version():
    assert attention.package_version() is None


def qkv(length=40, source=40, heads=3, head=64, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, heads, head, generator=generator).to(dtype) for n in (length, source, source)]


def reference(query, key, value, **options):
    parts = (x.double().transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*parts, **options).transpose(1, 2)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}])
def test_fa3_is_the_attention_of_torch(package, options):
    found = attend(*qkv(), **options)
    assert found.dtype == torch.bfloat16 and relative(found, reference(*qkv(), **options)) < 4e-3


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}])
def test_fp8_stays_within_the_rounding_of_e4m3(package, options):
    """e4m3 rounds by at most 2^-4 of a value: about 3 % in the sum, whatever the sizes of heads."""
    package.calls.clear()
    query, key, value = qkv()
    value = value * torch.tensor([1.0, 1e-3, 1e3]).bfloat16()[:, None]
    for head in range(3):
        found = attend_fp8(query, key, value, **options)[:, :, head]
        assert found.dtype == torch.bfloat16
        assert 1e-3 < relative(found, reference(query, key, value, **options)[:, :, head]) < 0.08
    assert {dtype for dtype, _ in package.calls} == {torch.float8_e4m3fn}


def test_keys_go_without_their_mean_which_softmax_does_not_see(package):
    query, key, value = qkv()
    shifted = key + 30 * torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = reference(query, shifted, value)
    assert (
        relative(attend_fp8(query, shifted, value), expected) < 0.2
    )  # bfloat16 itself holds the shifted keys to 2 bits less
    (q, qf), (k, kf), (v, vf) = map(attention.to_fp8, (query, shifted, value))
    naive = package.flash_attn_func(q, k, v, q_descale=qf, k_descale=kf, v_descale=vf)
    assert relative(naive, expected) > 0.5


def test_attention_to_the_text_stays_in_bfloat16(package):
    package.calls.clear()
    found = attend_fp8(*qkv(source=12))
    assert relative(found, reference(*qkv(source=12))) < 4e-3
    assert package.calls == [(torch.bfloat16, (2, 40, 3, 64))]


def test_zeros_give_no_nan(package):
    assert torch.equal(
        attend_fp8(*(torch.zeros_like(x) for x in qkv())), torch.zeros(2, 40, 3, 64, dtype=torch.bfloat16)
    )


def test_masks_and_split_videos_are_refused(package):
    for options in ({"attn_mask": torch.ones(40, 40)}, {"_parallel_config": object()}):
        for function in (attend, attend_fp8):
            with pytest.raises(UsageError, match="takes no mask and attends within one process"):
                function(*qkv(), **options)


@pytest.mark.parametrize("backend", SLOTS)
def test_a_pipeline_runs_it_and_others_of_the_process_do_not(package, pipe_dir, monkeypatch, backend):
    monkeypatch.setattr(sampling, "check_attention", lambda *_: None)  # of the machine
    load.cache_clear()
    plain = Sampler(load(str(pipe_dir)), SETTINGS).make("a red ball", 3, None, lambda step: None)
    package.calls.clear()
    load.cache_clear()
    sampler = Sampler(load(str(pipe_dir)), replace(SETTINGS, attention_backend=backend))
    found = sampler.make("a red ball", 3, None, lambda step: None)
    own = torch.float8_e4m3fn if backend == "fa3-fp8" else torch.float32
    assert {dtype for dtype, _ in package.calls} == {own, torch.float32}
    difference = relative(found.latents, plain.latents.double())
    assert (0 < difference < 0.2) if backend == "fa3-fp8" else difference < 1e-4
    package.calls.clear()
    load.cache_clear()
    again = Sampler(load(str(pipe_dir)), SETTINGS).make("a red ball", 3, None, lambda step: None)
    assert torch.equal(again.latents, plain.latents) and not package.calls
    load.cache_clear()


@pytest.mark.parametrize("function", [attend, attend_fp8])
def test_it_compiles_into_one_graph(package, function):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: function(*x) * 2, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*qkv()), function(*qkv()) * 2)


def test_it_is_refused_where_it_cannot_run_with_what_to_do(monkeypatch):
    monkeypatch.setattr(attention, "package_version", lambda: None)
    for arguments, words in (
        ((None, 1, None), r"needs the package fa3-fwd: pip install 'wan-ptq\[attention\]'"),
        (("bfloat16", 1, "cpu"), "needs a Hopper GPU .* the device is cpu"),
        (("float32", 1, None), r"in float32 \(--dtype\)"),
        (("bfloat16", 2, "cuda"), "made by 2"),
    ):
        with pytest.raises(UsageError, match=words) as raised:
            check_attention("fa3-fp8", *arguments)
        assert "\n" not in str(raised.value) and "Leave it out" in str(raised.value)
        check_attention(None, *arguments)
        check_attention("sage", *arguments)  # diffusers' own names are diffusers' to check
    monkeypatch.setattr(attention, "package_version", lambda: "0.0.3")
    for capability, words in (((8, 0), "cuda has 8.0"), ((10, 0), "cuda has 10.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with pytest.raises(UsageError, match=words):
            check_attention("fa3", "bfloat16", 1, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_attention("fa3", "bfloat16", 1, "cuda:1")


def test_a_sampler_refuses_it_too(pipe_dir):
    with pytest.raises(UsageError, match="needs a Hopper GPU"):
        Sampler(load(str(pipe_dir)), replace(SETTINGS, dtype="bfloat16", attention_backend="fa3"))


def test_doctor_and_run_json_name_it(package, monkeypatch):
    assert attention_facts("cpu")["attention fa3, fa3-fp8"].startswith("not here: it needs a Hopper GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert attention_facts("cuda")["attention fa3, fa3-fp8"] == "fa3-fwd 0.0.3"
    plan = RunPlan(units=1, samples_per_prompt=1, shards=1, prompts=None)
    eight = describe_run(replace(SETTINGS, attention_backend="fa3-fp8"), MODEL, "world", plan)
    assert eight.settings["attention_backend"] == "fa3-fp8" and eight.versions["fa3-fwd"] == "0.0.3"
    assert "fa3-fwd" not in describe_run(SETTINGS, MODEL, "world", plan).versions


def test_which_attentions_multiply_in_eight_bits():
    assert all(map(rounds_more, ("fa3-fp8", "sage", "_sage_qk_int8_pv_fp8_cuda_sm90", "SAGE_HUB")))
    assert not any(map(rounds_more, (None, "fa3", "flash", "_native_cudnn")))
