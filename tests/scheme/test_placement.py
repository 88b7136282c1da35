"""Binade limits of the FP8 fold, the ladder of placements, and the counters of blocks out of range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq import formats
from ptq.scheme.mxfp4 import MAGNITUDES
from ptq.scheme.placement import DECODED, DTYPES, E4M3_RANGE, E5M2_RANGE, FACTOR_LIMIT, place_rows, summarize
from ptq.scheme.tensors import pack_nibbles

place = formats.get("mxfp4").place
E2M1 = torch.tensor(MAGNITUDES + tuple(-value for value in MAGNITUDES), dtype=torch.float64)


def fits(dtype, exponent):
    values = E2M1 * 2.0**exponent
    return torch.equal(values.float().to(dtype).double(), values)


@pytest.mark.parametrize(
    ("dtype", "limits", "binades"),
    [(torch.float8_e4m3fn, E4M3_RANGE, 15), (torch.float8_e5m2, E5M2_RANGE, 29)],
)
def test_binade_limits_are_exactly_where_they_are_claimed(dtype, limits, binades):
    exact = [exponent for exponent in range(-40, 40) if fits(dtype, exponent)]
    assert exact == list(range(limits[0], limits[1] + 1)) and len(exact) == binades


def test_hif4_levels_are_exact_in_fp8_and_values_in_bfloat16():
    integers = torch.arange(29.0)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        levels = torch.tensor([k * 2.0**e for k in range(8) for e in range(3)])
        assert torch.equal(levels.to(dtype).float(), levels) and levels.max() == integers.max()
    fmt = formats.get("hif4")
    words = torch.arange(0, 255, dtype=torch.int32).reshape(-1, 1)
    words = torch.cat((words, words | 0x5555AA00, words | -256))  # exponents zero, mixed and one
    elements = (torch.arange(64, dtype=torch.uint8) % 16).expand(len(words), 64)
    values = fmt.dequantize(formats.Codes(elements, words))
    assert torch.equal(values.bfloat16().float(), values)
    assert not torch.equal(values.clamp(-400, 400).to(torch.float8_e4m3fn).float(), values.clamp(-400, 400))


def weight(exponents, nibbles):
    """Packed weight [N, K/2] and scales [N, G] with given block exponents and the same 32 nibbles in each block."""
    scale = (torch.tensor(exponents) + 127).to(torch.uint8)
    elements = torch.tensor(nibbles, dtype=torch.uint8).repeat(scale.shape[0], scale.shape[1])
    return pack_nibbles(elements), scale


ALL_NIBBLES = [*range(16), *range(16)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-60, 60), min_size=3, max_size=3), min_size=1, max_size=4),
    narrow=st.integers(0, 30),
)
def test_every_placement_holds_every_value_exactly(rows, narrow):
    rows = [[value // (1 + narrow) for value in row] for row in rows]
    packed, scale = weight(rows, ALL_NIBBLES)
    placement = place(packed, scale)
    fmt = formats.get("mxfp4")
    values = fmt.dequantize(fmt.unpack(packed, scale)).double()
    exponent = placement.exponent if placement.row_exponents is None else placement.row_exponents.unsqueeze(1)
    stored = torch.ldexp(values, -torch.as_tensor(exponent))
    assert torch.equal(stored.float().to(DTYPES[placement.kind]).double(), stored)
    low, high = min(map(min, rows)), max(map(max, rows))
    span, row_span = high - low + 1, max(max(row) - min(row) for row in rows) + 1
    expected = "e4m3" if span <= 15 else "e4m3-row" if row_span <= 15 else "e5m2" if span <= 29 else "bf16"
    assert placement.kind == expected
    assert str(span) in placement.reason


@pytest.mark.parametrize(("span", "kind"), [(15, "e4m3"), (16, "e5m2"), (29, "e5m2"), (30, "bf16")])
def test_the_ladder_steps_at_the_limits(span, kind):
    packed, scale = weight([[0, span - 1]], ALL_NIBBLES)
    assert place(packed, scale).kind == kind


def test_rows_of_different_size_get_their_own_factor():
    packed, scale = weight([[0, 14], [-20, -6], [40, 26]], ALL_NIBBLES)
    placement = place(packed, scale)
    assert placement.kind == "e4m3-row" and placement.row_exponents.tolist() == [8, -12, 34]


def test_blocks_of_zeros_do_not_count():
    packed, scale = weight([[0, -100], [3, 5]], ALL_NIBBLES)
    packed[0, 16:] = 0x80  # a zero with a sign bit is still zero
    assert place(packed, scale).kind == "e4m3"
    packed[0] = 0
    assert place(packed, scale).kind == "e4m3"
    assert place(torch.zeros(2, 32, dtype=torch.uint8), scale).kind == "e4m3"


def test_a_row_of_zeros_does_not_disturb_the_rows():
    packed, scale = weight([[0, 14], [-20, -6], [0, 0]], ALL_NIBBLES)
    packed[2] = 0
    placement = place(packed, scale)
    assert placement.kind == "e4m3-row" and placement.row_exponents[2] == 0


def test_extreme_exponents_stay_in_bfloat16():
    for exponent in (FACTOR_LIMIT + 1, -FACTOR_LIMIT - 1):
        packed, scale = weight([[exponent, exponent]], ALL_NIBBLES)
        placement = place(packed, scale)
        assert placement.kind == "bf16" and "extreme" in placement.reason


def test_a_nan_scale_is_refused():
    packed, scale = weight([[0, 1]], ALL_NIBBLES)
    scale[0, 1] = 0xFF
    with pytest.raises(formats.FormatError, match="NaN"):
        place(packed, scale)


def test_summary_counts_kinds_and_names_the_lower_ones():
    wide = place(*weight([[0, 20]], ALL_NIBBLES))
    narrow = place(*weight([[0, 2]], ALL_NIBBLES))
    lines = summarize({"a": narrow, "b": wide, "c": narrow})
    assert lines == ["e4m3: 2 of 3 layers", "e5m2: 1 of 3 layers", f"b: e5m2, {wide.reason}"]


def test_empty_weight():
    assert place(torch.empty(0, 32, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.uint8)).kind == "e4m3"


def test_hif4_with_mantissas_is_decoded():
    fmt = formats.get("hif4")
    assert fmt.place(*fmt.pack(fmt.quantize(torch.ones(2, 64)))) is DECODED
    assert DTYPES[DECODED.kind] == torch.bfloat16 and DECODED.row_exponents is None and DECODED.exponent == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-120, 120), min_size=2, max_size=2).map(sorted), min_size=1, max_size=5))
def test_exponent_ranges_alone_decide(rows):
    """A format that knows its rows' exponents gets the placement that MXFP4 codes with these exponents get."""
    low, high = torch.tensor(rows, dtype=torch.int32).unbind(1)
    found, expected = place_rows(low, high), place(*weight(rows, ALL_NIBBLES))
    assert (found.kind, found.exponent, found.reason) == (expected.kind, expected.exponent, expected.reason)
    rows_of = [None if one.row_exponents is None else one.row_exponents.tolist() for one in (found, expected)]
    assert rows_of[0] == rows_of[1]


@pytest.mark.parametrize("e_ref", [0, -5])
def test_counters(e_ref):
    pytest.importorskip("triton", reason="triton exists on Linux only")
    from ptq.runtime.kernels.quantize import count_outside_reference

    exponents = [[E5M2_RANGE[0] - 1, E5M2_RANGE[0], E5M2_RANGE[1], E5M2_RANGE[1] + 1, E5M2_RANGE[1] + 2, 50]]
    packed, scale = weight([[value + e_ref for value in exponents[0]]], ALL_NIBBLES)
    packed[0, 80:] = 0  # the last block is zero, wherever its scale is
    assert count_outside_reference(formats.get("mxfp4"), packed, scale, e_ref) == (2, 1)
    scale[0, 3] = 0xFF
    assert count_outside_reference(formats.get("mxfp4"), packed, scale, e_ref) == (1, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(-15, 13), st.integers(0, 2**32 - 1))
def test_activation_blocks_inside_the_range_are_exact_in_e5m2(exponent, seed):
    """Quantized activations whose block exponent lies in the range equal their FP8 form bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 32, generator=generator) * 4.0 * 2.0**exponent
    x[0, 0] = 4.0 * 2.0**exponent  # fixes the block exponent under the floor rule
    values = formats.get("mxfp4").fake_quantize(x)
    assert torch.equal(values.to(torch.float8_e5m2).float(), values)
