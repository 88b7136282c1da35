"""Quantizing values that are already on the grid: when nothing changes, and that it settles (docs/formats.md)."""

import numpy as np
import pytest
import torch

from ptq.formats import Codes, get
from ptq.scheme.hif4_words import split_words


def groups(count, size, seed):
    """Gaussian, heavy-tailed and coarse-grid groups over 80 binades, as float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, size))
    x[1::3] = rng.standard_t(2, (len(x[1::3]), size))
    x[2::3] = rng.integers(-28, 29, (len(x[2::3]), size)) / 4
    return torch.from_numpy((x * 2.0 ** rng.integers(-60, 20, (count, 1))).astype(np.float32))


@pytest.mark.parametrize("ties", ["even", "away"])
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "qmax7.25", "mse"])
def test_mxfp4_values_are_a_fixed_point(rule, ties):
    fmt, x = get("mxfp4"), groups(20000, 32, 0)
    codes = fmt.quantize(x, scale_rule=rule, ties=ties)
    values = fmt.dequantize(codes)
    assert torch.equal(fmt.fake_quantize(values, scale_rule=rule, ties=ties), values)
    if rule == "floor":
        again = fmt.quantize(values, ties=ties)
        assert torch.equal(again.elements, codes.elements) and torch.equal(again.scales, codes.scales)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "qmax7.25", "mse"])
def test_mxfp4_any_codes_are_a_fixed_point(rule):
    """Also codes no conversion would choose: random nibbles under every scale byte whose values are finite."""
    fmt, generator = get("mxfp4"), torch.Generator().manual_seed(0)
    elements = torch.randint(0, 16, (253 * 8, 32), generator=generator, dtype=torch.uint8)
    elements[1::2] &= torch.randint(8, 16, (1,), generator=generator, dtype=torch.uint8)
    values = fmt.dequantize(Codes(elements, torch.arange(253, dtype=torch.uint8).repeat(8)[:, None]))
    assert torch.equal(fmt.fake_quantize(values, scale_rule=rule), values)


def hif4_condition(codes):
    """Groups [n] that another conversion leaves alone: their maximum is 7 S, and with M = 3 no maximum of eight is 4 S
    and no maximum of four 2 S or (where e8 is set) 4 S: bfloat16(1/S) is below 1/S there, and the threshold is missed."""
    scale, e8, _ = split_words(codes.scales[:, 0])
    multiples = get("hif4").dequantize(codes).abs() / scale[:, None]
    v8, v16 = multiples.view(-1, 8, 8).amax(-1), multiples.view(-1, 16, 4).amax(-1)
    missed = (v8 == 4).any(1) | (v16 == 2.0 * (1 + e8.repeat_interleave(2, 1))).any(1)
    return (multiples.amax(1) == 7) & ~((codes.scales[:, 0] & 3 == 3) & missed)


def test_hif4_fixed_point_condition_is_exact():
    fmt, x = get("hif4"), groups(30000, 64, 1)
    x[::2] = torch.randn(15000, 64, generator=torch.Generator().manual_seed(2))
    # Elsewhere S is limited to 2^-48 or 49152 rather than derived from the maximum.
    amax = x.abs().amax(1)
    x = x[(amax > 2.0**-44) & (amax < 2.0**17)]
    codes = fmt.quantize(x)
    values = fmt.dequantize(codes)
    unchanged = (fmt.fake_quantize(values) == values).all(1)
    assert torch.equal(unchanged, hif4_condition(codes))
    assert 0.5 < unchanged.float().mean() < 0.95  # both outcomes occur


@pytest.mark.parametrize("seed", range(3))
def test_hif4_settles_after_one_more_conversion(seed):
    fmt = get("hif4")
    once = fmt.fake_quantize(groups(30000, 64, seed))
    twice = fmt.fake_quantize(once)
    assert not torch.equal(twice, once)
    assert torch.equal(fmt.fake_quantize(twice), twice)


def test_hif4_example_where_the_scale_moves():
    """Maximum 8: S = 1.25, k = 6, value 7.5; 7.5/7 rounds to S = 1 and the value to 7."""
    fmt, x = get("hif4"), torch.zeros(64)
    x[0] = 8.0
    assert fmt.fake_quantize(x)[0] == 7.5
    assert fmt.fake_quantize(fmt.fake_quantize(x))[0] == 7.0


def test_hif4_share_of_gaussian_groups_that_move():
    fmt = get("hif4")
    values = fmt.fake_quantize(torch.randn(50000, 64, generator=torch.Generator().manual_seed(3)))
    again = fmt.fake_quantize(values)
    assert (again != values).any(1).float().mean().item() == pytest.approx(0.211, abs=0.008)
    moved = (again - values).square().sum() / values.square().sum()
    assert moved < 0.003


def test_hif4_codes_are_kept_by_encode_whatever_the_conversion_would_do():
    """`encode` with the stored steps is the way to keep codes: it reproduces them always."""
    fmt = get("hif4")
    codes = fmt.quantize(groups(5000, 64, 4))
    steps = fmt.steps(codes.scales)
    assert torch.equal(fmt.encode(fmt.dequantize(codes), steps), codes.elements)
