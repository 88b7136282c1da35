"""Quantizing against independent float64 implementations: scales, rounding, ties, odd groups, refusals."""

import numpy as np
import pytest
import torch
from reference import mxfp4_exponent, quantize_hif4, quantize_mxfp4

from ptq.formats import FormatError, get

RULES = ("floor", "ceil", "even", "qmax7.25")


def fuzz(group, count, seed=0):
    """float32 groups over all magnitudes: gaussian, heavy tails, a few values on a coarse grid (ties), exact zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, group))
    x[1::4] = rng.standard_t(2, (len(x[1::4]), group))
    x[2::4] = rng.integers(-28, 29, (len(x[2::4]), group)) / 4
    x[3::4] *= rng.random((len(x[3::4]), group)) < 0.3
    return (x * 2.0 ** rng.integers(-60, 60, (count, 1))).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", ["even", "away"])
@pytest.mark.parametrize("rule", RULES)
def test_mxfp4_equals_the_reference(rule, ties, dtype):
    fmt, x = get("mxfp4"), torch.from_numpy(fuzz(32, 4000)).to(dtype)
    nibbles, scales = quantize_mxfp4(x.double().numpy(), rule, ties)
    codes = fmt.quantize(x, scale_rule=rule, ties=ties)
    np.testing.assert_array_equal(codes.scales[:, 0].numpy(), scales)
    np.testing.assert_array_equal(codes.elements.numpy(), nibbles)
    assert torch.equal(fmt.fake_quantize(x, scale_rule=rule, ties=ties).float(), fmt.dequantize(codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", ["away", "even"])
def test_hif4_equals_the_reference(ties, dtype):
    fmt, x = get("hif4"), torch.from_numpy(fuzz(64, 1500)).to(dtype)
    nibbles, words = quantize_hif4(x.double().numpy(), ties)
    codes = fmt.quantize(x, ties=ties)
    np.testing.assert_array_equal(codes.scales[:, 0].numpy().view(np.uint32), words)
    np.testing.assert_array_equal(codes.elements.numpy(), nibbles)
    assert torch.equal(fmt.fake_quantize(x, ties=ties).float(), fmt.dequantize(codes))


@pytest.mark.parametrize("rule", RULES)
def test_mxfp4_scale_at_the_thresholds(rule):
    """Exactly on, one float32 below and one above every multiple that a rule looks at, in many binades."""
    marks = np.array([4, 5, 6, 7, 7.25, 7.5, 8], dtype=np.float32)
    marks = np.concatenate([np.nextafter(marks, np.float32(0)), marks, np.nextafter(marks, np.float32(9))])
    amax = (marks * (np.float32(2) ** np.arange(-120, 125, dtype=np.float32))[:, None]).astype(np.float32).flatten()
    x = torch.zeros(len(amax), 32)
    x[:, 5] = -torch.from_numpy(amax)
    expected = np.clip(mxfp4_exponent(amax.astype(np.float64), rule) + 127, 0, 252)
    np.testing.assert_array_equal(get("mxfp4").quantize(x, scale_rule=rule).scales[:, 0].numpy(), expected)


@pytest.mark.parametrize("rule", (*RULES, "mse"))
def test_mxfp4_smallest_and_largest_groups(rule):
    """float32 subnormals keep byte 0; the largest values stay finite and below 6 * 2^125."""
    fmt = get("mxfp4")
    x = torch.zeros(4, 32)
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = 2.0**-149, 2.0**-127, torch.finfo(torch.float32).max, 2.0**127
    codes = fmt.quantize(x, scale_rule=rule)
    values = fmt.dequantize(codes)[:, 0]
    assert codes.scales[:2, 0].tolist() == [0, 0] and codes.scales.max() <= 252
    assert values.tolist() == [0.0, 2.0**-127, 6 * 2.0**125, 2.0**127]
    assert torch.equal(fmt.fake_quantize(x, scale_rule=rule)[:, 0], values)


@pytest.mark.parametrize("magnitude", [1.0, 2.0**-100, 2.0**100])
def test_mxfp4_mse_takes_the_better_exponent(magnitude):
    """Also where squares of the values themselves would vanish or overflow in float32."""
    fmt = get("mxfp4")
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((3000, 32)).astype(np.float32)) * magnitude
    floor, codes = fmt.quantize(x), fmt.quantize(x, scale_rule="mse")

    def error(scales):
        steps = fmt.steps(scales)
        return ((fmt.decode(fmt.encode(x, steps), steps) - x).double() / magnitude).square().sum(1)

    raised = codes.scales.int() - floor.scales.int()
    assert set(raised.flatten().tolist()) == {0, 1}
    best = torch.minimum(error(floor.scales), error(floor.scales + 1))
    torch.testing.assert_close(error(codes.scales), best, rtol=1e-6, atol=0)
    assert torch.equal(codes.elements, fmt.encode(x, fmt.steps(codes.scales)))


def test_ties_options_differ_exactly_on_ties():
    mx, hi = get("mxfp4"), get("hif4")
    x = torch.zeros(64)
    x[:8] = torch.tensor([4.0, 0.25, -0.75, 1.25, 1.75, -2.5, 3.5, 5.0])
    x[32] = 4.0
    assert mx.fake_quantize(x)[:8].tolist() == [4.0, 0.0, -1.0, 1.0, 2.0, -2.0, 4.0, 4.0]
    assert mx.fake_quantize(x, ties="away")[:8].tolist() == [4.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, 6.0]
    below = torch.zeros(32)
    below[0], below[1] = 4.0, torch.nextafter(torch.tensor(0.25), torch.tensor(0.0))
    assert mx.quantize(below, ties="away").elements[1] == 0  # adding one half in float32 would round up
    x = torch.zeros(64)
    x[0], x[8:12] = 7.0, torch.tensor([0.125, 0.375, -0.625, 1.0])  # S = 1; the quad at 8 has step 1/4
    assert hi.fake_quantize(x)[8:12].tolist() == [0.25, 0.5, -0.75, 1.0]
    assert hi.fake_quantize(x, ties="even")[8:12].tolist() == [0.0, 0.5, -0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        ("mxfp4", "floor", 0.01322),
        ("mxfp4", "ceil", 0.01335),
        ("mxfp4", "even", 0.01253),
        ("mxfp4", "qmax7.25", 0.01247),
        ("mxfp4", "mse", 0.01246),
        ("hif4", "reference", 0.0069),
        ("hif4", "mse", 0.00622),
    ],
)
def test_relative_mse_on_gaussians(name, rule, expected):
    x = torch.randn(4096, 512, generator=torch.Generator().manual_seed(7))
    error = (get(name).fake_quantize(x, scale_rule=rule) - x).double().square().mean() / x.double().square().mean()
    assert error.item() == pytest.approx(expected, rel=0.006)


@pytest.mark.parametrize(
    ("name", "options", "share"), [("mxfp4", ("even", "away"), 0.0068), ("hif4", ("away", "even"), 0.0010)]
)
def test_share_of_ties_in_bfloat16_gaussians(name, options, share):
    x = torch.randn(4096, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    a, b = (get(name).quantize(x, ties=ties).elements for ties in options)
    assert (a != b).float().mean().item() == pytest.approx(share, rel=0.15)


# Odd groups.


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_zero_group(name):
    fmt = get(name)
    for rule in fmt.scale_rules:
        codes = fmt.quantize(torch.zeros(2, 64), scale_rule=rule)
        assert codes.elements.eq(0).all() and codes.scales.eq(0).all()
        assert fmt.dequantize(codes).eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "rule"), [("mxfp4", "floor"), ("mxfp4", "mse"), ("hif4", "reference"), ("hif4", "mse")]
)
def test_non_finite_group_becomes_nan_and_leaves_its_neighbours(name, rule, bad):
    fmt = get(name)
    clean = torch.randn(3, 2 * fmt.group_size, generator=torch.Generator().manual_seed(0))
    x = clean.clone()
    x[1, 3] = bad
    codes, expected = fmt.quantize(x, scale_rule=rule), fmt.quantize(clean, scale_rule=rule)
    assert codes.scales[1, 0] == 0xFF and codes.elements[1, : fmt.group_size].eq(0).all()
    hit = torch.zeros(3, 2, dtype=torch.bool)
    hit[1, 0] = True
    assert torch.equal(codes.scales[~hit], expected.scales[~hit])
    for values in (fmt.dequantize(codes), fmt.fake_quantize(x, scale_rule=rule)):
        assert torch.equal(values.isnan(), hit.repeat_interleave(fmt.group_size, 1))


@pytest.mark.parametrize("rule", ["reference", "mse"])
def test_hif4_limits(rule):
    fmt = get("hif4")
    x = torch.zeros(4, 64)
    x[:, 0] = torch.tensor([3.4e38, 344064.0, 2.0**-149, 7 * 2.0**-48])
    codes = fmt.quantize(x, scale_rule=rule)
    assert (codes.scales[:, 0] & 0xFF).tolist() == [0xFE, 0xFE, 0, 0]
    assert fmt.dequantize(codes)[:, 0].tolist() == [344064.0, 344064.0, 0.0, 7 * 2.0**-48]


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_float16_is_quantized_as_its_values_and_saturates(name):
    fmt = get(name)
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)).half()
    assert torch.equal(fmt.quantize(x).elements, fmt.quantize(x.float()).elements)
    assert torch.equal(fmt.fake_quantize(x), fmt.dequantize(fmt.quantize(x)).half())
    top = torch.full((1, 64), 65504.0).half()
    for rule in fmt.scale_rules:
        assert fmt.fake_quantize(top, scale_rule=rule).isfinite().all()
    if name == "mxfp4":
        assert fmt.fake_quantize(top, scale_rule="ceil").eq(65504.0).all()  # 65536 on the grid


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 0, 128), (2, 3, 5, 128)])
def test_any_leading_shape_and_strides(name, shape):
    fmt = get(name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    codes = fmt.quantize(x)
    assert codes.elements.shape == shape and codes.scales.shape == (*shape[:-1], shape[-1] // fmt.group_size)
    flat = fmt.quantize(x.reshape(-1, shape[-1]))
    assert torch.equal(codes.elements.reshape(-1, shape[-1]), flat.elements)
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert torch.equal(fmt.quantize(strided).elements, codes.elements)
    assert torch.equal(fmt.fake_quantize(strided), fmt.dequantize(codes))


def test_refusals():
    mx = get("mxfp4")
    with pytest.raises(FormatError, match=r"groups of 32.*\[4, 40\].*multiple of 32"):
        mx.quantize(torch.ones(4, 40))
    with pytest.raises(FormatError, match="groups of 64"):
        get("hif4").fake_quantize(torch.ones(96))
    for empty in (torch.ones(4, 0), torch.tensor(1.0)):
        with pytest.raises(FormatError, match="groups of 32"):
            mx.quantize(empty)
    for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(FormatError, match=f"takes float32, bfloat16 or float16, found {dtype}"):
            mx.quantize(torch.ones(32).to(dtype))
    with pytest.raises(FormatError, match=r"no scale rule 'max'; choose one of floor"):
        mx.quantize(torch.ones(32), scale_rule="max")
    with pytest.raises(FormatError, match=r"no ties option 'up'; choose one of away, even"):
        get("hif4").quantize(torch.ones(64), ties="up")
    with pytest.raises(FormatError, match="Unknown format 'nvfp4'; choose one of mxfp4, hif4"):
        get("nvfp4")
