"""Compiled and eager conversions give the same codes."""

import shutil

import pytest
import torch

from ptq.formats import FormatError, base, compiled, get


@pytest.fixture
def everything_is_large(monkeypatch):
    """Compile from the first element on, in chunks small enough for a test."""
    monkeypatch.setattr(compiled, "COMPILE_MIN_ELEMENTS", 1)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 64 * 256)


def awkward(dtype):
    """Two and a half chunks with heavy tails, many magnitudes, ties, zeros, subnormals and non-finite groups."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 512, generator=generator).pow(3) * 2.0 ** torch.randint(-30, 30, (80, 1), generator=generator)
    x[3] = torch.round(x[3] / x[3].abs().max() * 28) / 4
    x[4], x[5, :100], x[6, 7], x[7, 200] = 0.0, 2.0**-130, float("nan"), float("inf")
    x[8] *= 2.0**100
    return x.to(dtype)


def no_compiler():
    return not compiled.compile_support()[0]


@pytest.mark.slow
@pytest.mark.skipif(no_compiler(), reason="torch.compile needs a C++ compiler and Python's headers")
@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_compiled_equals_eager(everything_is_large, monkeypatch, name):
    calls = []
    original = compiled._try
    monkeypatch.setattr(compiled, "_try", lambda *a: calls.append(1) or original(*a))
    fmt, x = get(name), awkward(torch.bfloat16)
    packed, scale = compiled.quantize_and_pack(fmt, x)
    values = compiled.fake_quantize(fmt, x)
    assert len(calls) == 4 and compiled._failed is None  # two whole chunks each; the rest is eager
    expected_packed, expected_scale = fmt.pack(fmt.quantize(x))
    assert torch.equal(packed, expected_packed) and torch.equal(scale, expected_scale)
    torch.testing.assert_close(values, fmt.fake_quantize(x), rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(values[values == 0]).any()
    assert (torch.tensor([2.0**-130]) * 0.5).item() != 0.0  # a kernel built with fast-math must not flush subnormals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_eager_path_equals_the_format(name, dtype):
    fmt, x = get(name), awkward(dtype)
    for rule in fmt.scale_rules:
        for ties in fmt.ties_options:
            packed, scale = compiled.quantize_and_pack(fmt, x, scale_rule=rule, ties=ties)
            expected_packed, expected_scale = fmt.pack(fmt.quantize(x, scale_rule=rule, ties=ties))
            assert torch.equal(packed, expected_packed) and torch.equal(scale, expected_scale)
            values = compiled.fake_quantize(fmt, x, scale_rule=rule, ties=ties)
            expected = fmt.fake_quantize(x, scale_rule=rule, ties=ties)
            torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_errors_are_those_of_the_format():
    with pytest.raises(FormatError, match="groups of 64"):
        compiled.quantize_and_pack(get("hif4"), torch.ones(2, 32))
    with pytest.raises(FormatError, match="no scale rule"):
        compiled.fake_quantize(get("mxfp4"), torch.ones(2, 32), scale_rule="best")


def test_without_a_compiler_support_says_so_and_the_eager_path_runs(everything_is_large, monkeypatch, tmp_path):
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    compiled.compile_support.cache_clear()
    try:
        supported, reason = compiled.compile_support()
        assert not supported and "No C++ compiler" in reason
        fmt, x = get("hif4"), torch.randn(300, 64)
        monkeypatch.setattr(compiled, "_compiled", lambda *a: pytest.fail("must not compile"))
        packed, _ = compiled.quantize_and_pack(fmt, x)
        assert torch.equal(packed, fmt.pack(fmt.quantize(x))[0])
    finally:
        compiled.compile_support.cache_clear()


def test_a_failing_toolchain_is_reported_and_the_result_is_right(everything_is_large, monkeypatch):
    def broken(*_):
        def run(_):
            raise torch._dynamo.exc.TorchDynamoException("ld: cannot find -lgomp")

        return run

    monkeypatch.setattr(compiled, "_compiled", broken)
    monkeypatch.setattr(compiled, "compile_support", lambda: (True, ""))
    monkeypatch.setattr(compiled, "_failed", None)
    fmt, x = get("mxfp4"), torch.randn(1100, 32)
    with pytest.warns(UserWarning, match="cannot find -lgomp"):
        packed, _ = compiled.quantize_and_pack(fmt, x)
    assert torch.equal(packed, fmt.pack(fmt.quantize(x))[0])


def test_support_names_the_compiler():
    supported, reason = compiled.compile_support()
    assert supported == (shutil.which("g++") is not None or shutil.which("clang++") is not None) or "Python.h" in reason
    assert reason.endswith(".")
