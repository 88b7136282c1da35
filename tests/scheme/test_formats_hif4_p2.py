"""HiF4's scale rule `p2`: powers of two as scales, equal to a loop in float64, exact in FP8, searched for weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import decode_hif4, quantize_hif4_p2

from ptq.formats import get
from ptq.scheme import Scheme, native
from ptq.scheme.placement import DTYPES, E4M3_RANGE, E5M2_RANGE, FACTOR_LIMIT

HIF4 = get("hif4")


@pytest.fixture(params=["native", "eager"])
def implementation(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(native, "takes", lambda x: False)


def groups(count, seed=0, low=-55, high=25):
    """float32 [count, 64]: gaussian, heavy tails, sparse, coarse grids with ties, across and beyond the range of S."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 64))
    x[1::4] = rng.standard_t(2, (len(x[1::4]), 64))
    x[2::4] *= rng.random((len(x[2::4]), 64)) < 0.2
    x[3::4] = rng.integers(-32, 33, (len(x[3::4]), 64)) / 4
    return torch.from_numpy((x * 2.0 ** rng.integers(low, high, (count, 1))).astype(np.float32))


def assert_equals_loop(x, ties=None):
    nibbles, words = quantize_hif4_p2(x.double().numpy(), ties or "even")
    codes = HIF4.quantize(x, scale_rule="p2", ties=ties)
    np.testing.assert_array_equal(codes.scales[:, 0].numpy().view(np.uint32), words)
    np.testing.assert_array_equal(codes.elements.numpy(), nibbles)
    assert torch.equal(HIF4.fake_quantize(x, scale_rule="p2", ties=ties).float(), HIF4.dequantize(codes))
    return codes


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ties", [None, "away"])
def test_equals_the_loop(dtype, ties):
    assert_equals_loop(groups(1500).clamp(-65504, 65504).to(dtype), ties)


@settings(max_examples=60, deadline=None)
@given(levels=hnp.arrays(np.int32, (2, 64), elements=st.integers(-64, 64)), exponent=st.integers(-149, 121))
def test_equals_the_loop_at_ties_thresholds_and_both_ends(levels, exponent):
    assert_equals_loop(torch.from_numpy(np.ldexp(levels.astype(np.float64), exponent).astype(np.float32)))


@pytest.mark.usefixtures("implementation")
def test_ends_of_the_scales():
    """Zeros and subnormals take byte 0, the largest values 2^15 without a mantissa, and saturate at 7 * 4 * 2^13 * 4."""
    x = torch.zeros(6, 64)
    x[1, 5], x[2, 0], x[3, 0], x[4, 0], x[5, 0] = 1e-45, 2.0**-47, 2.0**18, -3.4e38, float("inf")
    codes = HIF4.quantize(x, scale_rule="p2")
    assert (codes.scales[:, 0] & 0xFF).tolist() == [0, 0, 0, 4 * 63, 4 * 63, 0xFF]
    values = HIF4.dequantize(codes)
    assert not values[:2].any() and values[2, 0] == 2.0**-47
    assert values[3, 0] == 7 * 2.0**15 and values[4, 0] == -7 * 2.0**15 and values[5].isnan().all()


def test_ties_are_even_unless_asked_otherwise():
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 8:12] = 4.0, torch.tensor([0.125, 0.375, 0.625, 1.125])  # steps of 1/4: 0.5, 1.5, 2.5, 4.5
    assert HIF4.quantize(x, scale_rule="p2").elements[0, 8:12].tolist() == [0, 2, 2, 4]
    assert HIF4.quantize(x, scale_rule="p2", ties="away").elements[0, 8:12].tolist() == [1, 2, 3, 5]
    assert HIF4.options("p2") == ("p2", "even") and HIF4.options("mse") == ("mse", "away")
    config = Scheme.of("hif4", input_rule="p2").to_config()
    assert config["input_activations"]["ties"] == "even"
    assert Scheme.from_config(config, "here") == Scheme.of("hif4", input_rule="p2")


def test_what_is_stored_is_plain_hif4():
    """No mantissa, and a decoder that knows nothing of the rule reads the values."""
    x = groups(400, seed=1)
    packed, words = HIF4.quantize_and_pack(x, scale_rule="p2")
    assert not ((words & 0xFF) & 3).any()
    assert np.array_equal(decode_hif4(packed.numpy(), words.numpy()), HIF4.fake_quantize(x, scale_rule="p2").double())


def test_error_on_gaussians():
    x = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    error = {
        rule: float((HIF4.fake_quantize(x, scale_rule=rule) - x).square().sum() / x.square().sum())
        for rule in HIF4.scale_rules
    }
    assert error["p2"] == pytest.approx(0.0076, abs=1e-4) and error["mse"] < error["reference"] < error["p2"]


# The search of weight scales.


def brute_force(group, weights):
    """Smallest weighted squared error of float64 [64] over S of half to twice the rule's and all exponents."""
    _, words = quantize_hif4_p2(group[None])
    exponent = int(words[0]) % 256 // 4 - 48
    best = np.inf
    for scale in (2.0**e for e in range(exponent - 1, exponent + 2) if -48 <= e <= 15):
        total = 0.0
        for eight in range(8):
            by_e8 = []
            for e8 in (0, 1):
                error = 0.0
                for four in (2 * eight, 2 * eight + 1):
                    part = slice(4 * four, 4 * four + 4)
                    steps = [scale / 4 * 2 ** (e8 + e16) for e16 in (0, 1)]
                    grids = [np.minimum(np.round(np.abs(group[part]) / step), 7) * step for step in steps]
                    error += min((weights[part] * (np.abs(group[part]) - grid) ** 2).sum() for grid in grids)
                by_e8.append(error)
            total += min(by_e8)
        best = min(best, total)
    return best


@pytest.mark.parametrize("weighted", [False, True])
def test_search_of_weights_finds_the_best_power_of_two(weighted):
    w = groups(80, seed=2, low=-8, high=3)
    weights = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1 if weighted else torch.ones(64)
    words = HIF4.search_scales(w, weights if weighted else None, "p2")
    assert not ((words & 0xFF) & 3).any()
    steps = HIF4.steps(words)
    error = ((HIF4.decode(HIF4.encode(w, steps), steps) - w).double().square() * weights).sum(1)
    best = [brute_force(group, weights.double().numpy()) for group in w.double().numpy()]
    np.testing.assert_allclose(error.numpy(), best, rtol=1e-5, atol=1e-30)
    moved = (words & 0xFF)[:, 0] - (HIF4.quantize(w, scale_rule="p2").scales & 0xFF)[:, 0]
    assert set(moved.tolist()) >= {0, 4}


def test_search_stays_inside_the_scales_that_there_are():
    w = torch.stack([torch.full((64,), 2.0**-60), torch.full((64,), 2.0**18 - 1), torch.zeros(64)])
    words = HIF4.search_scales(w, None, "p2") & 0xFF
    assert ((words >= 0) & (words < 0xFF)).all() and not (words & 3).any()


def test_other_rules_leave_the_search_as_it_was():
    w = groups(64, seed=3, low=-4, high=2)
    plain = HIF4.search_scales(w, None)
    assert torch.equal(HIF4.search_scales(w, None, "mse"), plain)
    assert ((plain & 0xFF) & 3).any()


# Exactness in FP8.


def codes_with(exponents, levels=8):
    """Packed weight [N, 32 G] whose fours hold levels 0..7 with k * 2^j for the given j [N][G]; e8 and e16 are 0."""
    words = (torch.tensor(exponents, dtype=torch.int32) + 2 + 48) * 4
    elements = (torch.arange(64, dtype=torch.uint8) % 16).repeat(*words.shape)
    return HIF4.pack(type(HIF4.quantize(torch.ones(64)))(elements, words))


@pytest.mark.parametrize(("kind", "limits"), [("e4m3", E4M3_RANGE), ("e5m2", E5M2_RANGE)])
def test_fp8_holds_one_exponent_more_below_than_for_e2m1(kind, limits):
    """k * 2^j, k up to 7, is exact for j from limits[0] - 1 to limits[1], and for no other."""
    k = torch.arange(8, dtype=torch.float64)
    fits = [j for j in range(-40, 40) if torch.equal((k * 2.0**j).float().to(DTYPES[kind]).double(), k * 2.0**j)]
    assert fits == list(range(limits[0] - 1, limits[1] + 1))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-50, 13), min_size=3, max_size=3), min_size=1, max_size=4),
    narrow=st.integers(0, 30),
)
def test_every_placement_holds_every_value_exactly(rows, narrow):
    rows = [[value // (1 + narrow) for value in row] for row in rows]
    packed, words = codes_with(rows)
    placement = HIF4.place(packed, words)
    values = HIF4.dequantize(HIF4.unpack(packed, words)).double()
    exponent = placement.exponent if placement.row_exponents is None else placement.row_exponents.unsqueeze(1)
    stored = torch.ldexp(values, -torch.as_tensor(exponent))
    assert torch.equal(stored.float().to(DTYPES[placement.kind]).double(), stored)
    low, high = min(map(min, rows)), max(map(max, rows))
    span, row_span = high - low + 1, max(max(row) - min(row) for row in rows) + 1
    assert placement.kind == (
        "e4m3" if span <= 16 else "e4m3-row" if row_span <= 16 else "e5m2" if span <= 30 else "bf16"
    )
    assert max(abs(low), abs(high)) < FACTOR_LIMIT


def test_micro_exponents_count_and_zeros_do_not():
    packed, words = codes_with([[0, -14]])
    assert HIF4.place(packed, words).kind == "e4m3"
    doubled = words | torch.tensor([[0x00010100, 0]])  # the first e8 and e16: two binades higher
    assert HIF4.place(packed, doubled).kind == "e5m2"
    empty = packed.clone()
    empty[:, 32:] = 0x80  # a zero with a sign is a zero
    assert HIF4.place(empty, codes_with([[0, -50]])[1]).kind == "e4m3"


def test_a_mantissa_anywhere_means_bfloat16_and_a_nan_is_refused():
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    packed, words = HIF4.quantize_and_pack(x, scale_rule="p2")
    assert HIF4.place(packed, words).kind == "e4m3"
    assert HIF4.place(packed, words | torch.tensor([[0, 1]], dtype=torch.int32)).kind == "bf16"
    with pytest.raises(ValueError, match="damaged"):
        HIF4.place(packed, words | 0xFF)


@settings(max_examples=50, deadline=None)
@given(st.integers(-14, 15), st.integers(0, 2**32 - 1))
def test_activations_inside_the_range_are_exact_in_e5m2(exponent, seed):
    """A group with 4 S <= maximum, S = 2^exponent, uses k * 2^j with j from exponent - 2 to exponent (28 values of S)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 64, generator=generator)
    x = x / x.abs().max() * 4.0 * 2.0**exponent
    values = HIF4.fake_quantize(x, scale_rule="p2")
    assert torch.equal(values.to(torch.float8_e5m2).float(), values) == (exponent - 0 <= E5M2_RANGE[1])


def test_products_with_an_e4m3_weight_are_exact_in_float32():
    """Three significant bits times three: every single product, and sums of products of equal exponents."""
    k = torch.arange(8, dtype=torch.float64)
    pairs = (k[:, None] * k[None, :]).flatten()
    for j in (-25, 0, 19):
        assert torch.equal((pairs * 2.0**j).float().double(), pairs * 2.0**j)
    a = HIF4.fake_quantize(torch.randn(16, 1024, generator=torch.Generator().manual_seed(1)), scale_rule="p2")
    w = HIF4.fake_quantize(torch.randn(16, 1024, generator=torch.Generator().manual_seed(2)), scale_rule="p2")
    exact = a.double() @ w.double().T
    assert torch.equal(exact.float().double(), exact)


def test_only_p2_is_exact_in_fp8():
    assert [rule for rule in HIF4.scale_rules if HIF4.exact_in_fp8(rule)] == ["p2"]
    assert not HIF4.exact_in_fp8(None)
