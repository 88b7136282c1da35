"""The quantizer under the interpreter: codes equal to the torch reference, element by element."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ptq import formats
from ptq.runtime.kernels.quantize import count_outside_reference, quantize, quantize_reference
from ptq.runtime.kernels.residual import parts_of
from ptq.scheme import Scheme
from ptq.scheme.learned import encode_blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
GOLDEN = Path(__file__).parents[3] / "golden"
OUTPUTS = {"mxfp4": ("packed", "bf16", "fp8"), "hif4": ("packed", "bf16", "fp8")}
EVERY_OUTPUT = [(name, out) for name, outs in OUTPUTS.items() for out in outs]
EVERY_RULE = [
    (name, rule, out)
    for name, out in EVERY_OUTPUT
    for rule in formats.get(name).scale_rules
    if out != "fp8" or formats.get(name).exact_in_fp8(rule)
]
SIZES = (16, 32, 64, 128)


def smoothed(name, block):
    return Scheme.of(name, transform="smoothed", block=block)


def exact_input(rows, k, dtype=torch.bfloat16, seed=0):
    """Values whose rotated sums are exact in float32 in any order: 7 bits over 7 binades, times 4 bits of smoothing."""
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randint(-127, 128, (rows, k), generator=generator)
    exponent = torch.randint(-3, 4, (rows, k), generator=generator)
    smooth = torch.randint(4, 16, (k,), generator=generator) / 8
    return torch.ldexp(mantissa.float(), exponent).to(dtype), smooth.to(torch.bfloat16)


def assert_equal(found, expected):
    assert found.values.dtype == expected.values.dtype
    assert torch.equal(found.values.float().nan_to_num(12345.0), expected.values.float().nan_to_num(12345.0))
    assert (found.scales is None) == (expected.scales is None)
    if found.scales is not None:
        assert torch.equal(found.scales, expected.scales)


def check(x, basis, scheme, out, **options):
    if out == "fp8" and not scheme.format.exact_in_fp8(scheme.input_rule):
        with pytest.raises(formats.FormatError, match="not exact in FP8"):
            quantize(x, basis, scheme, out, **options)
        return
    assert_equal(quantize(x, basis, scheme, out, **options), quantize_reference(x, basis, scheme, out, **options))


def test_parts_of_residual_blocks():
    found = {unit: parts_of((0, 3), unit, torch.device("cpu")).tolist() for unit in (32, 64, 128)}
    assert found == {32: [0, 1, 6, 7], 64: [0, 3], 128: [0, 3]}


RESIDUAL_CASES = [
    ("mxfp4", "even", "packed", "learned", 32),
    ("mxfp4", "mse", "fp8", "smoothed", 32),
    ("mxfp4", "floor", "bf16", "learned", 128),
    ("hif4", "mse", "bf16", "learned", 64),
    ("hif4", "reference", "packed", "learned", 128),
    ("hif4", "p2", "fp8", "none", 0),
]


@pytest.mark.parametrize(("name", "rule", "out", "transform", "block"), RESIDUAL_CASES)
def test_residual_blocks(name, rule, out, transform, block, monkeypatch):
    """The residual of some blocks behind the row; units of 32 and of 128 channels are shorter and longer than a block."""
    x, smooth = exact_input(3, 256)
    basis = {"none": None, "smoothed": smooth}.get(transform)
    basis = exact_blocks(256, block) if transform == "learned" else basis
    scheme = Scheme.of(name, transform=transform, block=block, input_rule=rule)
    check(x, basis, scheme, out, residual=(0, 3))
    if block == 128:  # where it is taken in panels, and multiplied in two halves
        monkeypatch.setattr("ptq.runtime.kernels.quantize.WHOLE", ())
        check(x, basis, scheme, out, residual=(0, 3))
    if (name, rule) == ("mxfp4", "even"):
        for setting, value in (("MANY_ROWS", 130), ("STEPS", 2)):  # a program walks several tiles
            monkeypatch.setattr(f"ptq.runtime.kernels.quantize.{setting}", value)
        x, _ = exact_input(130, 256)
        plain, wide = (quantize(x, basis, scheme, out, residual=blocks).values for blocks in ((), (1,)))
        assert torch.equal(wide[:, : plain.shape[1]].view(torch.uint8), plain.view(torch.uint8))
        assert wide.shape[1] - plain.shape[1] == (32 if out == "packed" else 64)


def exact_blocks(k, size, seed=0):
    """Learned blocks whose entries are multiples of 1/8, so that sums with `exact_input` are exact."""
    entries = torch.randint(-8, 9, (k // size, size, size), generator=torch.Generator().manual_seed(seed))
    entries[:, 0, 0] = 8
    return encode_blocks(entries.float())


@pytest.mark.parametrize(("name", "out"), EVERY_OUTPUT)
@pytest.mark.parametrize(
    ("transform", "blocks"),
    [("none", (0,)), ("hadamard", SIZES), ("smoothed", (0, *SIZES)), ("learned", SIZES)],
)
def test_every_transform_with_every_block_and_every_rule(name, out, transform, blocks):
    """Blocks with the default rule, rules with the largest block: a rule sees what the transform left, whatever its block."""
    x, smooth = exact_input(7, 256, seed=1)
    x[0, :64] = 0
    fmt = formats.get(name)
    usual, *others = fmt.scale_rules
    for block, rule in [*((block, usual) for block in blocks), *((blocks[-1], rule) for rule in others)]:
        if transform == "learned" and block % fmt.group_size:
            continue
        basis = {"smoothed": smooth, "learned": exact_blocks(256, block or 64)}.get(transform)
        check(x, basis, Scheme.of(name, transform=transform, block=block, input_rule=rule), out)


@pytest.mark.parametrize(("name", "out"), EVERY_OUTPUT)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_learned_blocks(name, out, size, rows):
    if size % formats.get(name).group_size:
        pytest.skip("blocks hold whole groups")
    x, _ = exact_input(rows, 384)
    scheme = Scheme.of(name, transform="learned", block=size)
    check(x, exact_blocks(384, size), scheme, out)
    if rows and size == 64:  # how rows are read does not depend on the size of the blocks
        check(x.T.contiguous().T.float() / 64, exact_blocks(384, size, 1), scheme, out)


SOME_RULES = [("mxfp4", "even", "fp8"), ("hif4", "mse", "bf16"), ("hif4", "reference", "packed")]


@pytest.mark.parametrize(("name", "rule", "out"), SOME_RULES)
def test_blocks_of_128_where_k_divides_and_smaller_ones_elsewhere(name, rule, out):
    for k, size in ((192, 64), (256, 128), (96, 32)):
        x, smooth = exact_input(5, k, seed=k)
        if k % formats.get(name).group_size:
            continue
        for transform, basis in (("hadamard", None), ("smoothed", smooth), ("learned", exact_blocks(k, size))):
            check(x, basis, Scheme.of(name, transform=transform, block=128, input_rule=rule), out)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_learned_blocks_hold_every_e4m3_value(name):
    blocks = torch.arange(4096, dtype=torch.int32).remainder(127).to(torch.uint8).view(1, 64, 64)
    blocks[:, ::2] |= 0x80
    check(torch.eye(64, dtype=torch.bfloat16), blocks, Scheme.of(name, transform="learned", block=64), "bf16")


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_learned_blocks_with_groups_that_are_not_finite(name):
    x, _ = exact_input(4, 128)
    x[1, 70] = float("inf")
    check(x, exact_blocks(128, 64), Scheme.of(name, transform="learned", block=64), "packed")


@pytest.mark.parametrize(("name", "rule", "out"), EVERY_RULE)
def test_every_binade(name, rule, out):
    """Gaussian groups, so that squared errors round, from below HiF4's smallest scale to where float32 products overflow."""
    x = torch.randn(440, 128, generator=torch.Generator().manual_seed(2)) / 8
    x = x * torch.ldexp(torch.ones(440, 1), torch.arange(-236, 204).unsqueeze(1) // 2)
    check(x, None, Scheme.of(name, input_rule=rule), out)


@pytest.mark.parametrize(("name", "rule", "out"), EVERY_RULE)
def test_ties_thresholds_and_saturation(name, rule, out):
    levels = torch.randint(-32, 33, (64, 128), generator=torch.Generator().manual_seed(5)).float() / 4
    levels[::8] = levels[::8].abs().amax(1, keepdim=True) * levels[::8].sign()
    for exponent in (-110, -49, -17, 0, 12, 30, 99):
        check(torch.ldexp(levels, torch.tensor(exponent)), None, Scheme.of(name, input_rule=rule), out)


def test_blocks_beyond_all_that_float32_products_hold_saturate():
    x = torch.full((2, 64), 1.0)
    x[0, 0], x[1, 0] = 3e38, -3e38
    values = quantize(x, None, Scheme.of("mxfp4", input_rule="even"), "fp8").values.float()
    assert values[0, 0] == 57344 and values[1, 0] == -57344 and values.isfinite().all()


def test_many_rows_are_walked_in_steps(monkeypatch):
    """A program takes several tiles from MANY_ROWS rows on; the last one is moved up to where all its rows exist."""
    module = sys.modules[quantize.__module__]
    monkeypatch.setattr(module, "MANY_ROWS", 200)
    x, _ = exact_input(333, 64)
    grid = Scheme.of("mxfp4", transform="learned", block=64)
    assert module.constants(grid, "fp8", x.dtype, 64, 0, 333, 90)["STEPS"] == module.STEPS > 1
    for name, rule, out in (("mxfp4", "even", "fp8"), ("hif4", "p2", "packed")):
        check(x, exact_blocks(64, 64), Scheme.of(name, transform="learned", block=64, input_rule=rule), out)
        check(x, None, Scheme.of(name, transform="hadamard", block=32, input_rule=rule), out)
    large, counters = x[:70] * 2.0**20, torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(module, "MANY_ROWS", 64)
    quantize(large, exact_blocks(64, 64), grid, "fp8", counters=counters)  # no row is counted twice
    packed = quantize(large, exact_blocks(64, 64), grid, "packed")
    expected = count_outside_reference(grid.format, packed.values, packed.scales)
    assert tuple(counters.tolist()) == expected and expected[0] > 70


@pytest.mark.parametrize(("families", "unit"), [((90, 100), 128), ((), 64)], ids=["whole", "panels"])
def test_a_block_of_128_is_taken_whole_or_in_panels(families, unit, monkeypatch):
    """By the matrix instructions of the device; the codes are the same."""
    module = sys.modules[quantize.__module__]
    monkeypatch.setattr(module, "WHOLE", families)
    monkeypatch.setattr(module, "MANY_ROWS", 60)
    monkeypatch.setattr(module, "STEPS", 1)  # of 64 columns
    grid = Scheme.of("mxfp4", transform="learned", block=128)
    chosen = module.constants(grid, "fp8", torch.bfloat16, 256, 0, 333, 90)
    assert (chosen["L"], chosen["ROWS"], chosen["BLOCK"], chosen["STEPS"]) == (unit, 64, 128, 2 * module.STEPS)
    x, _ = exact_input(70, 256)
    x[7, 200] = float("nan")
    for name, rule, out in SOME_RULES:
        check(x, exact_blocks(256, 128), Scheme.of(name, transform="learned", block=128, input_rule=rule), out)


def fma(x, y, z):
    """x * y + z of float32, rounded once, as GPUs do it; float64 holds the product."""
    return (np.float64(x) * np.float64(y) + np.float64(z)).astype(np.float32)


@pytest.mark.parametrize("out", ["packed", "bf16"])
def test_fused_products_in_the_search_only_decide_ties(out, monkeypatch):
    """With fused products the search may take the other of two equal errors: values stay on the grid and as good."""
    calls = []

    def create_fma(self, x, y, z):
        calls.append(1)
        return TensorHandle(fma(x.data, y.data, z.data), x.dtype.scalar)

    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(6))
    x[::2] = (x[::2] * 4).round() / 4  # errors that are equal occur
    scheme = Scheme.of("hif4", input_rule="mse")
    plain = quantize_reference(x, None, scheme, out)
    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)
    found = quantize(x, None, scheme, out)
    assert calls
    if out == "packed":
        values = scheme.format.decode_packed(found.values, found.scales)
        expected = scheme.format.decode_packed(plain.values, plain.scales)
        same = found.scales == plain.scales
    else:
        values, expected = found.values.float(), plain.values.float()
        words = scheme.format.quantize(x, scale_rule="mse").scales
        assert values.isfinite().all() and words.shape == (128, 4)
        same = (values == expected).unflatten(1, (4, 64)).all(-1)
    error, best = ((y - x).double().square().unflatten(1, (4, 64)).sum(-1) for y in (values, expected))
    assert (error <= best * (1 + 1e-6)).all()
    assert torch.equal(values.unflatten(1, (4, 64))[same], expected.unflatten(1, (4, 64))[same])
    assert same.float().mean() > 0.9  # and where it is not: a tie, by the errors above


@pytest.mark.parametrize(("name", "out"), EVERY_OUTPUT)
@pytest.mark.parametrize("rows", [0, 1, 7, 63, 512])
def test_row_counts(name, out, rows):
    x, _ = exact_input(rows, 64)
    check(x, None, Scheme.of(name, transform="hadamard", block=32), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_input_dtypes(dtype):
    x, smooth = exact_input(9, 192, dtype)
    check(x / 64, smooth, smoothed("mxfp4", 32), "packed")
    check(x / 64, smooth, smoothed("hif4", 64), "packed")


def test_strided_and_transposed_input():
    x, smooth = exact_input(12, 256)
    for view, vector in ((x[:, 64:192], smooth[64:192]), (x[::3], smooth), (x[:, ::2], smooth[::2].contiguous())):
        check(view, vector, smoothed("mxfp4", 32), "packed")
    check(x.T.contiguous().T, smooth, smoothed("hif4", 64), "bf16")


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_groups_that_are_not_finite(name, bad):
    x, _ = exact_input(4, 128)
    x[1, 70] = bad
    for out in ("packed", "bf16"):
        for rule in formats.get(name).scale_rules:
            check(x, None, Scheme.of(name, input_rule=rule), out)
            check(x, None, Scheme.of(name, transform="hadamard", block=32, input_rule=rule), out)


def test_nan_becomes_the_fp8_nan():
    x, _ = exact_input(2, 64)
    x[1, 40] = float("nan")
    for rule in ("floor", "even"):
        bits = quantize(x, None, Scheme.of("mxfp4", input_rule=rule), "fp8").values.view(torch.uint8)
        assert (bits[1, 32:] == 0x7F).all() and (bits[0] != 0x7F).all() and (bits[1, :32] != 0x7F).all()
    bits = quantize(x, None, Scheme.of("hif4", input_rule="p2"), "fp8").values.view(torch.uint8)
    assert (bits[1] == 0x7F).all() and (bits[0] != 0x7F).all()


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_golden_vectors(name):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    cases = [key.removesuffix(".input") for key in golden if key.endswith(".input")]
    assert len(cases) >= 9
    for case in cases:
        x = golden[f"{case}.input"].flatten(0, -2)[:16]
        found = quantize(x, None, Scheme.of(name), "packed")
        assert torch.equal(found.values, golden[f"{case}.weight_packed"].flatten(0, -2)[:16]), case
        assert torch.equal(found.scales, golden[f"{case}.weight_scale"].flatten(0, -2)[:16]), case


def test_gaussian_input_differs_only_where_sums_round():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    smooth = (torch.rand(512, generator=torch.Generator().manual_seed(4)) + 0.5).to(torch.bfloat16)
    for name in ("mxfp4", "hif4"):
        scheme = smoothed(name, 32)
        found = quantize(x, smooth, scheme, "bf16").values.float()
        expected = quantize_reference(x, smooth, scheme, "bf16").values.float()
        assert (found != expected).sum() <= 3  # of 32768: a sum within one float32 ulp of a rounding threshold


@pytest.mark.parametrize("e_ref", [-3, 0, 4])
def test_fp8_outside_its_exact_range(e_ref):
    """Blocks beyond 29 binades saturate or round as the reference does, and are counted."""
    x, _ = exact_input(48, 64)
    x = x.float() * torch.ldexp(torch.ones(48, 1), torch.arange(-34, 14).unsqueeze(1))
    x[7, 40] = float("inf")
    for scheme in (Scheme.of("mxfp4"), Scheme.of("mxfp4", input_rule="even"), Scheme.of("hif4", input_rule="p2")):
        check(x, None, scheme, "fp8", e_ref=e_ref)
        counters = torch.zeros(2, dtype=torch.int32)
        quantize(x, None, scheme, "fp8", e_ref=e_ref, counters=counters)
        packed = quantize(x, None, scheme, "packed")
        expected = count_outside_reference(scheme.format, packed.values, packed.scales, e_ref)
        assert tuple(counters.tolist()) == expected
        assert min(expected) > 0 or e_ref == 4


def test_hif4_with_mantissas_has_no_fp8_form():
    for rule in ("reference", "mse"):
        with pytest.raises(formats.FormatError, match="not exact in FP8"):
            quantize(torch.zeros(1, 64), None, Scheme.of("hif4", input_rule=rule), "fp8")
    packed = quantize(torch.full((1, 64), 1.25 * 7), None, Scheme.of("hif4"), "packed")
    with pytest.raises(formats.FormatError, match="mantissas"):
        count_outside_reference(formats.get("hif4"), packed.values, packed.scales)
