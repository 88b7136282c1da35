"""Decoding against an independent float64 decoder, exhaustively, and the inverse of decoding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import decode_hif4, decode_mxfp4

from ptq.formats import Codes, FormatError, get

ALL_NIBBLES_TWICE = np.tile(np.arange(16, dtype=np.uint8), 2)


def assert_decodes_to(fmt, packed, scale, expected):
    with np.errstate(over="ignore"):  # MXFP4 bytes 253 and 254 reach past float32
        expected = expected.astype(np.float32)
    found = fmt.dequantize(fmt.unpack(torch.from_numpy(packed), torch.from_numpy(scale))).numpy()
    np.testing.assert_array_equal(found, expected)


def test_mxfp4_every_scale_byte_with_every_nibble():
    scale = np.arange(256, dtype=np.uint8)[:, None]
    packed = np.tile((ALL_NIBBLES_TWICE[0::2] | ALL_NIBBLES_TWICE[1::2] << 4), (256, 1))
    assert_decodes_to(get("mxfp4"), packed, scale, decode_mxfp4(packed, scale))


def test_hif4_every_scale_byte_with_every_exponent_bits_and_nibble():
    """256 bytes x 4 exponent combinations x 16 nibbles: one row a byte, one exponent pattern a group.

    The four elements of a quad show four nibbles, so 4 groups a pattern show all 16 in every quad.
    """
    groups = []
    for pattern in (0x000000, 0x0000FF, 0xFFFF00, 0xFFFFFF, 0x5A3C96):
        for start in range(0, 16, 4):
            groups.append((pattern, np.tile(np.arange(start, start + 4), 16)))
    nibbles = np.concatenate([n for _, n in groups])
    packed = np.tile((nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8), (256, 1))
    words = np.array([[byte | pattern << 8 for pattern, _ in groups] for byte in range(256)], dtype=np.uint32)
    assert_decodes_to(get("hif4"), packed, words.view(np.int32), decode_hif4(packed, words.view(np.int32)))


def all_codes(name):
    """Codes with every valid scale byte (and exponent bits) against every nibble but -0."""
    fmt = get(name)
    bytes_ = torch.arange(255)
    if name == "mxfp4":
        scales = bytes_[:253, None].to(torch.uint8)
    else:
        patterns = torch.tensor([0x000000, 0x0000FF, 0xFFFF00, 0xFFFFFF, 0x5A3C96])
        scales = (bytes_[:, None] | patterns << 8).to(torch.int64).flatten()[:, None]
        scales = torch.where(scales >= 2**31, scales - 2**32, scales).to(torch.int32)
    scales = scales.repeat_interleave(4, 0)
    quads = torch.arange(16, dtype=torch.uint8).view(4, 4).repeat(len(scales) // 4, fmt.group_size // 4)
    return fmt, Codes(torch.where(quads == 8, 0, quads), scales)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_encode_inverts_decode(name):
    fmt, codes = all_codes(name)
    steps = fmt.steps(codes.scales)
    assert torch.equal(fmt.encode(fmt.decode(codes.elements, steps), steps), codes.elements)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_encode_finds_the_nearest_level(name):
    """Against brute force over all sixteen values, for random x and steps; also past the largest level."""
    fmt = get(name)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 5
    steps = (
        torch.tensor([0.25, 1.0, 3.5])[torch.arange(4000) % 3]
        if name == "hif4"
        else torch.tensor([0.5, 1, 2])[torch.arange(4000) % 3]
    )
    found = fmt.decode(fmt.encode(x, steps), steps)
    every = fmt.levels(torch.arange(16, dtype=torch.uint8))[:, None] * steps
    best = (every - x).abs().amin(0)
    torch.testing.assert_close((found - x).abs(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("x", [float("inf"), -float("inf"), 3e38])
def test_encode_saturates(name, x):
    fmt = get(name)
    assert fmt.encode(torch.tensor([x]), torch.tensor([2.0**-20])).item() == (7 if x > 0 else 15)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_negative_zero_is_never_written(name):
    fmt = get(name)
    x = torch.full((fmt.group_size,), -1e-6)
    x[0], x[1] = 4.0, -0.0
    codes = fmt.quantize(x)
    assert codes.elements[1:].eq(0).all()
    for values in (fmt.dequantize(codes), fmt.fake_quantize(x), fmt.fake_quantize(-x.abs().clamp(max=0))):
        assert not torch.signbit(values).any()
    assert fmt.encode(torch.tensor([-1e-6, -0.0]), torch.tensor(1.0)).tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["mxfp4", "hif4"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_pack_round_trip(name, leading, groups, seed):
    fmt = get(name)
    generator = torch.Generator().manual_seed(seed)
    k = groups * fmt.group_size
    elements = torch.randint(0, 16, (*leading, k), generator=generator, dtype=torch.uint8)
    limits = (0, 256) if name == "mxfp4" else (-(2**31), 2**31)
    scales = torch.randint(*limits, (*leading, groups), generator=generator).to(fmt.scale_dtype)
    packed, stored = fmt.pack(Codes(elements, scales))
    assert packed.shape == (*leading, k // 2) and packed.dtype == torch.uint8
    back = fmt.unpack(packed, stored)
    assert torch.equal(back.elements, elements) and torch.equal(back.scales, scales)
    assert torch.equal(packed & 15, elements[..., 0::2]) and torch.equal(packed >> 4, elements[..., 1::2])


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_packed_tensors_that_do_not_belong_together_are_refused(name):
    fmt = get(name)
    packed, scale = fmt.pack(fmt.quantize(torch.ones(3, 128)))
    with pytest.raises(FormatError, match="uint8"):
        fmt.unpack(packed.to(torch.int16), scale)
    with pytest.raises(FormatError, match=r"with scales \[3, \d\]"):
        fmt.unpack(packed, scale[:2])
    with pytest.raises(FormatError, match="torch"):
        fmt.unpack(packed, scale.to(torch.int64))
    with pytest.raises(FormatError, match="with scales"):
        fmt.unpack(packed[:, :-1], scale)


# Exactness facts that kernels and solvers rely on.


def test_e2m1_times_powers_of_two_is_exact_in_float8():
    magnitudes = get("mxfp4").levels(torch.arange(16, dtype=torch.uint8))
    for dtype, binades, top in ((torch.float8_e4m3fn, 15, 6), (torch.float8_e5m2, 29, 13)):
        exact = [
            d
            for d in range(40)
            if torch.equal((magnitudes * 2.0 ** (top - d)).to(dtype).float(), magnitudes * 2.0 ** (top - d))
        ]
        assert exact == list(range(binades))


def test_hif4_integers_and_bfloat16_are_exact():
    k = torch.arange(8.0)
    integers = torch.cat([k * f for f in (1, 2, 4)])
    assert integers.max() == 28
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        assert torch.equal(integers.to(dtype).float(), integers)
    _, codes = all_codes("hif4")
    values = get("hif4").dequantize(codes)
    assert torch.equal(values.bfloat16().float(), values) and values.max() == 344064
    m3 = integers * 1.75
    assert not torch.equal(m3.to(torch.float8_e4m3fn).float(), m3)  # with M = 3 five bits are needed
