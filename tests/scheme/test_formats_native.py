"""Compiled kernels against the eager functions, which the golden vectors and float64 references check as well."""

import contextlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch._subclasses.fake_tensor import FakeTensorMode

from ptq.formats import FORMATS, FormatError, get
from ptq.scheme import Codes, native

OPTIONS = [(name, rule, ties) for name, f in FORMATS.items() for rule in f.scale_rules for ties in f.ties_options]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = (0.0, 1e-45, 2.0**-130, 2.0**-126, 1.0, 1.25, 2.5, 3.5, 7.0, 2.0**127, 3.4028235e38, np.inf, np.nan)
SPECIAL_BITS = np.concatenate([np.float32(SPECIAL), -np.float32(SPECIAL)]).view(np.uint32).tolist()


@contextlib.contextmanager
def eager():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "takes", lambda x: False)
        yield


def assert_native_equals_eager(x, name, rule, ties):
    fmt, options = get(name), {"scale_rule": rule, "ties": ties}
    assert native.takes(x)
    codes, packed, values = (
        fmt.quantize(x, **options),
        fmt.quantize_and_pack(x, **options),
        fmt.fake_quantize(x, **options),
    )
    with eager():
        expected, expected_values = fmt.quantize(x, **options), fmt.fake_quantize(x, **options)
    assert codes.elements.shape == x.shape and values.shape == x.shape and values.dtype == x.dtype
    expected_tensors = (expected.elements, expected.scales, *fmt.pack(expected))
    for found, wanted in zip((codes.elements, codes.scales, *packed), expected_tensors, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    integers = torch.int32 if x.dtype == torch.float32 else torch.int16
    nan = expected_values.isnan()
    assert torch.equal(values.isnan(), nan)
    bits, expected_bits = values.view(integers), expected_values.view(integers)  # tells -0 from 0
    assert torch.equal(bits.masked_fill(nan, 0), expected_bits.masked_fill(nan, 0))


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_equals_eager(name):
    """Every nibble under every scale byte, with random micro-exponents."""
    fmt, generator = get(name), torch.Generator().manual_seed(0)
    groups = 256 * 4
    elements = torch.randint(0, 16, (8, groups // 8 * fmt.group_size), generator=generator, dtype=torch.uint8)
    elements[:, : 16 * fmt.group_size] = torch.arange(16, dtype=torch.uint8).repeat(fmt.group_size)
    scales = torch.randint(-(2**31), 2**31, (groups,), generator=generator)
    scales = ((scales & ~0xFF) | torch.arange(256).repeat(4)).to(torch.int32).to(fmt.scale_dtype).view(8, -1)
    codes = Codes(elements, scales)
    packed = fmt.pack(codes)
    found = (fmt.dequantize(codes), fmt.decode_packed(*packed), fmt.decode_packed(*(x[1:5] for x in packed)))
    with eager():
        wanted = (fmt.dequantize(codes), fmt.decode_packed(*packed), fmt.decode_packed(*(x[1:5] for x in packed)))
    assert wanted[0].isnan().any() and (wanted[0] == 0).any()
    for values, expected in zip(found, wanted, strict=True):
        nan = expected.isnan()
        assert torch.equal(values.isnan(), nan)
        bits, expected_bits = values.view(torch.int32), expected.view(torch.int32)  # tells -0 from 0
        assert torch.equal(bits.masked_fill(nan, 0), expected_bits.masked_fill(nan, 0))


def random_bits(rows, k, seed=0):
    """float32 of any bits, then groups of similar magnitude in every binade, with ties and a few values that are not finite."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2**32, (rows, k), dtype=np.uint32)
    exponents = generator.integers(0, 255, (rows, 1)) - generator.integers(0, 5, (rows, k))
    near = (bits & 0x807FFFFF) | (exponents.clip(0, 254).astype(np.uint32) << 23)
    near[::3] &= 0xFFF80000
    near[::7, 3] = generator.choice(SPECIAL_BITS, len(near[::7]))
    return torch.from_numpy(np.concatenate([bits, near]).view(np.float32))


def narrowed(x, dtype):
    """x in another dtype; bfloat16 by its upper bits, so that every pattern occurs."""
    return x.view(torch.int16)[..., 1::2].contiguous().view(torch.bfloat16) if dtype == torch.bfloat16 else x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "rule", "ties"), OPTIONS)
def test_random_bits(name, rule, ties, dtype):
    assert_native_equals_eager(narrowed(random_bits(3000, 192), dtype), name, rule, ties)


@settings(max_examples=60, deadline=None)
@given(
    bits=hnp.arrays(np.uint32, (2, 64), elements=st.integers(0, 2**32 - 1) | st.sampled_from(SPECIAL_BITS)),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(OPTIONS),
)
def test_any_bits(bits, dtype, options):
    assert_native_equals_eager(narrowed(torch.from_numpy(bits.view(np.float32)), dtype), *options)


@settings(max_examples=100, deadline=None)
@given(
    levels=hnp.arrays(np.int32, (2, 64), elements=st.integers(-64, 64)),
    exponent=st.integers(-155, 121),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(OPTIONS),
)
def test_ties_and_thresholds_in_every_binade(levels, exponent, dtype, options):
    x = torch.from_numpy(np.ldexp(levels.astype(np.float64), exponent).astype(np.float32))
    assert_native_equals_eager(x.to(dtype), *options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_shapes_and_layouts(name, dtype):
    x = random_bits(15, 128).to(dtype)
    inputs = (x[0], x[:0], x.view(3, 2, 5, 128), x.T.contiguous().T, x[:, 64:], x[::2], x.view(30, 64, 2)[..., 0])
    for case in (*inputs, x.clone().requires_grad_(), torch.nn.Parameter(x)):
        assert_native_equals_eager(case, name, None, None)
        assert not get(name).fake_quantize(case).requires_grad


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_input_is_left_alone_and_nothing_is_shared_with_it(name):
    x = torch.ones(4, 64)
    values = get(name).fake_quantize(x)
    values.zero_()
    assert x.eq(1).all()


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_ordinary_cpu_tensors_take_the_kernels_and_no_others(name, monkeypatch):
    fmt = get(name)
    for function in ("quantize_columns", "fake_quantize_columns"):
        monkeypatch.setattr(type(fmt), function, lambda *_: pytest.fail("eager"))
    fmt.quantize(torch.ones(2, 64)), fmt.fake_quantize(torch.ones(2, 64)), fmt.quantize_and_pack(torch.ones(2, 64))
    monkeypatch.undo()
    monkeypatch.setattr(type(fmt), "kernels", lambda *_: pytest.fail("native"))
    for context in (torch.device("meta"), FakeTensorMode()):
        with context:
            x = torch.ones(2, 64)
            codes, values, packed = fmt.quantize(x), fmt.fake_quantize(x), fmt.quantize_and_pack(x)[0]
        assert codes.elements.device == x.device and values.shape == x.shape and packed.shape == (2, 32)
    x = torch.randn(4, 64)
    compiled = torch.compile(fmt.fake_quantize, backend="eager", fullgraph=True)
    traced = {rule: compiled(x, scale_rule=rule) for rule in fmt.scale_rules}
    monkeypatch.undo()
    for rule, values in traced.items():
        assert torch.equal(values, fmt.fake_quantize(x, scale_rule=rule))


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_large_tensors_use_several_threads(name, monkeypatch):
    fmt, x = get(name), random_bits(64, 256)  # 128 rows
    expected = fmt.quantize(x)

    class Meeting:
        """A kernel that returns only when two threads are in it."""

        def __init__(self, kernel):
            self.kernel, self.stats, self.barrier, self.threads = kernel, kernel.stats, threading.Barrier(2), set()

        def __call__(self, part, *arguments):
            if len(part):
                self.threads.add(threading.get_ident())
                self.barrier.wait(timeout=60)
            self.kernel(part, *arguments)

    original = fmt.kernels("floor" if name == "mxfp4" else "reference", fmt.ties_options[0])
    meeting = Meeting(original.codes)
    monkeypatch.setattr(type(fmt), "kernels", lambda *_: replace(original, codes=meeting))
    monkeypatch.setattr(native, "PART_ELEMENTS", 2**12)  # 8 parts
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        codes = fmt.quantize(x)
    finally:
        torch.set_num_threads(threads)
    assert original.codes.targetoptions["nogil"] and original.values.targetoptions["nogil"]
    assert len(meeting.threads) == 2 and threading.get_ident() not in meeting.threads
    assert torch.equal(codes.elements, expected.elements) and torch.equal(codes.scales, expected.scales)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_parts_of_uneven_size(name, monkeypatch):
    monkeypatch.setattr(native, "PART_ELEMENTS", 640)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        for dtype in DTYPES:
            assert_native_equals_eager(random_bits(37, 192).to(dtype), name, None, None)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_several_callers_at_once(name):
    """Python threads that call at the same time get the results of their own inputs."""
    fmt = get(name)
    inputs = [random_bits(200, 192, seed) for seed in range(4)]
    expected = [fmt.quantize(x).elements for x in inputs]
    wrong = []

    def work(index):
        for _ in range(20):
            if not torch.equal(fmt.quantize(inputs[index]).elements, expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_quantize_and_pack_refuses_what_quantize_refuses():
    with pytest.raises(FormatError, match="groups of 64"):
        get("hif4").quantize_and_pack(torch.ones(2, 32))
    with pytest.raises(FormatError, match="no scale rule"):
        get("mxfp4").quantize_and_pack(torch.ones(2, 32), scale_rule="best")


@pytest.mark.parametrize(("name", "rule", "ties"), OPTIONS)
def test_values_in_place_are_those_beside(name, rule, ties):
    """Compiled, for tensors that are not contiguous, and by the eager functions."""
    fmt, x = get(name), random_bits(40, 192)
    if ties != fmt.usual_ties(rule):
        return
    wanted, own = fmt.fake_quantize(x, scale_rule=rule).view(torch.int32), x.clone()
    found = fmt.fake_quantize_(own, scale_rule=rule)
    assert torch.equal(found.view(torch.int32), wanted) and found.data_ptr() == own.data_ptr()
    across = x.T.contiguous().T
    assert torch.equal(fmt.fake_quantize_(across, scale_rule=rule).view(torch.int32), wanted)
    with eager():
        finite = ~fmt.fake_quantize(x, scale_rule=rule).isnan()
        assert torch.equal(fmt.fake_quantize_(x, scale_rule=rule)[finite], found[finite])
