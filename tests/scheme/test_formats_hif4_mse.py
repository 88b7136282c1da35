"""HiF4's scale rule `mse`: equal to a search by brute force in float64, never worse than the reference's scales."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import hif4_byte, hif4_errors, quantize_hif4_mse

from ptq.formats import get
from ptq.scheme import native
from ptq.scheme.hif4_words import split_words

HIF4 = get("hif4")


@pytest.fixture(params=["native", "eager"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(native, "takes", lambda x: False)


def groups(count, seed=0):
    """float32 groups from far below the smallest scale to 2^20: gaussian, heavy tails, sparse, coarse grids with ties."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 64))
    x[1::4] = rng.standard_t(2, (len(x[1::4]), 64))
    x[2::4] *= rng.random((len(x[2::4]), 64)) < 0.2
    x[3::4] = rng.integers(-28, 29, (len(x[3::4]), 64)) / 4
    x *= 2.0 ** rng.integers(-55, 20, (count, 1))
    return torch.from_numpy(x[np.abs(x).max(1) < 2.0**20].astype(np.float32))


def quantize(x, ties=None):
    return HIF4.quantize(x, scale_rule="mse", ties=ties)


def assert_equals_brute_force(x, ties):
    nibbles, words = quantize_hif4_mse(x.double().numpy(), ties)
    codes = quantize(x, ties)
    np.testing.assert_array_equal(codes.scales[:, 0].numpy().view(np.uint32), words)
    np.testing.assert_array_equal(codes.elements.numpy(), nibbles)
    values = HIF4.fake_quantize(x, scale_rule="mse", ties=ties)
    assert torch.equal(values.float(), HIF4.dequantize(codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", ["away", "even"])
def test_equals_brute_force(ties, dtype):
    assert_equals_brute_force(groups(2000).to(dtype), ties)


@settings(max_examples=60, deadline=None)
@given(
    levels=hnp.arrays(np.int32, (2, 64), elements=st.integers(-64, 64)),
    exponent=st.integers(-60, 13),
    ties=st.sampled_from(["away", "even"]),
)
def test_equals_brute_force_on_equal_errors(levels, exponent, ties):
    """Few significant bits: errors are exact in float32, and choices that are equally good occur."""
    assert_equals_brute_force(torch.from_numpy(np.ldexp(levels.astype(np.float32), exponent)), ties)


def test_every_byte_is_tried():
    """All three offsets occur; at the top of the range there are fewer, and none is the NaN byte or beyond."""
    x = groups(3000, seed=1)
    offsets = (quantize(x).scales[:, 0] & 0xFF) - (HIF4.quantize(x).scales[:, 0] & 0xFF)
    assert set(offsets.tolist()) == {0, 1, 2}
    top = torch.linspace(250000.0, 900000.0, 200)[:, None] * torch.rand(200, 64).sort(1).values
    assert (quantize(top).scales & 0xFF).max() == 0xFE
    assert HIF4.dequantize(quantize(top)).isfinite().all()


def test_never_worse_than_the_reference_scales():
    x = groups(3000, seed=2)
    steps = HIF4.steps(HIF4.quantize(x).scales)
    nearest = HIF4.decode(HIF4.encode(x, steps), steps)

    def error(values):
        return (values.double() - x.double()).square().sum(1)

    found = error(HIF4.dequantize(quantize(x)))
    assert (found <= error(nearest) * (1 + 1e-6)).all()
    bytes_ = [hif4_byte(group) for group in x.abs().numpy()]
    free = torch.from_numpy(hif4_errors(x.double().numpy(), np.array(bytes_)).min(-1).sum(-1))
    assert (found <= free * (1 + 1e-6)).all() and (found < free * 0.99).float().mean() > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_do_not_depend_on_ties_and_elements_are_the_nearest(dtype):
    x = (torch.randn(3000, 64, generator=torch.Generator().manual_seed(3)) * 8).to(dtype)
    away, even = quantize(x), quantize(x, "even")
    assert torch.equal(away.scales, even.scales)
    assert torch.equal(away.elements, even.elements) == (dtype == torch.float32)  # too few elements to meet a tie
    assert torch.equal(away.elements, HIF4.encode(x.float(), HIF4.steps(away.scales)))


def test_ties_are_exact_but_for_one():
    """Midpoints k + 1/2 of every mantissa; a rounded 1/1.75 carries the even tie at 6.5 up to 7."""
    for mantissa in range(4):
        scale = 1 + mantissa / 4
        x = torch.tensor([1.0, 3.0, 5.0, 7.0]).repeat(1, 16) * scale / 4  # quarter steps, on the grid of this scale
        x[0, :4] = 7 * scale
        x[0, 8:15] = (torch.arange(7) + 0.5) * scale / 4
        codes = quantize(x)
        s, e8, e16 = split_words(codes.scales[0])
        assert (s.item(), e8[0, 1].item(), e16[0, 2:4].tolist()) == (scale, 0, [0, 0])
        assert codes.elements[0, 8:15].tolist() == [1, 2, 3, 4, 5, 6, 7]
        top = 7 if mantissa == 3 else 6
        assert quantize(x, "even").elements[0, 8:15].tolist() == [0, 2, 2, 4, 4, 6, top]


def test_huge_values_saturate_and_leave_the_other_fours_alone():
    x = torch.full((2, 64), 20000.0)
    x[0, 0], x[1, 0] = 3e38, 2.0**21
    values = HIF4.fake_quantize(x, scale_rule="mse")
    assert values[:, 0].eq(344064.0).all() and torch.equal(values[0], values[1])
    assert values[:, 8:].eq(2 * 49152.0 / 4).all()


def test_values_of_the_rule_are_nearly_a_fixed_point():
    values = HIF4.fake_quantize(torch.randn(20000, 64, generator=torch.Generator().manual_seed(4)), scale_rule="mse")
    again = HIF4.fake_quantize(values, scale_rule="mse")
    assert 0 < (again != values).any(1).float().mean() < 0.003
    assert torch.equal(HIF4.fake_quantize(again, scale_rule="mse"), again)
