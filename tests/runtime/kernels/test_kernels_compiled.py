"""Every shipped configuration compiled for sm_90, sm_100 and sm_120 without a GPU.

Asserts what silently goes wrong otherwise: FP8 products that become float16 ones, block scaling that is emulated,
registers spilled to memory, more shared memory than a block may have, contraction where rounding must be kept.
"""

import re
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton exists on Linux only")
from aot import SHARED_LIMIT, compile_for

from ptq.runtime.kernels import expand_weight, gemm_dot_scaled, gemm_fp8, gemm_packed, quantize, residual
from ptq.runtime.kernels.tiles import TILES, lookup
from ptq.scheme import Scheme, get_format

pytestmark = pytest.mark.slow
K = 5120
OLDER = tuple(int(part) for part in sys.modules["triton"].__version__.split(".")[:2]) < (3, 9)
"""Older compilers take up to a third more instructions and spill a few registers; what they compute is checked all the same."""
FP8_INSTRUCTION = {90: r"\bQGMMA", 100: r"\bUTCQMMA", 120: r"\bQMMA"}
SCALES = {"mxfp4": "*u8", "hif4": "*i32"}


def entries(kernel):
    """Distinct (family, tile) of the table that can be compiled here (80 shares its code with 90)."""
    found = {(family, tile) for (name, family, _, _), tile in TILES.items() if name == kernel and family >= 90}
    return sorted(found, key=str)


def named(parameter):
    family, tile = parameter
    return f"sm{family}-{tile.m}x{tile.n}x{tile.k}"


def descriptors(tile, a, w, per_byte=1):
    k = tile.k // per_byte
    return {"a_desc": f"tensordesc<{a}[{tile.m},{k}]>", "w_desc": f"tensordesc<{w}[{tile.n},{k}]>"}


def check_resources(binary, family):
    assert OLDER or (binary.stack == 0 and binary.instructions(r"\bSTL") == 0), "registers spill"
    assert binary.shared <= SHARED_LIMIT[family]


def compile_gemm_fp8(family, tile, weight="fp8e4nv"):
    signature = descriptors(tile, "fp8e5", weight) | {"out_ptr": "*bf16", "bias_ptr": "*bf16", "factor": "fp32"}
    signature |= {"row_exponents_ptr": "*i32", "M": "i32", "N": "i32"}
    aligned = ("out_ptr", "bias_ptr", "row_exponents_ptr", "N")
    constants = gemm_fp8.constants(tile, K)
    return compile_for(family, gemm_fp8.gemm_fp8_kernel, signature, constants, aligned, tile.options)


@pytest.mark.parametrize("entry", entries("gemm_fp8"), ids=named)
def test_gemm_fp8(entry):
    family, tile = entry
    binary = compile_gemm_fp8(family, tile)
    check_resources(binary, family)
    assert binary.instructions(FP8_INSTRUCTION[family]) > 0
    assert binary.instructions(r"\b(HMMA|HGMMA|UTCHMMA)") == 0
    assert "cp.async.bulk.tensor" in binary.ptx  # operands come through TMA descriptors


def test_gemm_fp8_takes_e5m2_weights():
    family, tile = entries("gemm_fp8")[0]
    binary = compile_gemm_fp8(family, tile, weight="fp8e5")
    assert binary.instructions(FP8_INSTRUCTION[family]) > 0 and binary.instructions(r"\b(HMMA|HGMMA)") == 0


@pytest.mark.parametrize("entry", entries("gemm_dot_scaled"), ids=named)
def test_gemm_dot_scaled(entry):
    family, tile = entry
    signature = descriptors(tile, "u8", "u8", per_byte=2) | {"a_scale_ptr": "*u8", "w_scale_ptr": "*u8"}
    signature |= {"out_ptr": "*bf16", "bias_ptr": "*bf16", "M": "i32", "N": "i32"}
    aligned = ("a_scale_ptr", "w_scale_ptr", "out_ptr", "bias_ptr", "N")
    constants = gemm_dot_scaled.constants(tile, K)
    binary = compile_for(family, gemm_dot_scaled.gemm_dot_scaled_kernel, signature, constants, aligned, tile.options)
    check_resources(binary, family)
    instruction = {100: r"tcgen05\.mma\S*kind::mxf4\S*block_scale", 120: r"mma\.sync\S*kind::mxf4\S*block_scale"}
    assert re.search(instruction[family], binary.ptx)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
@pytest.mark.parametrize("entry", entries("gemm_packed"), ids=named)
def test_gemm_packed(entry, name):
    family, tile = entry
    signature = {"x_ptr": "*bf16", "packed_ptr": "*u8", "scale_ptr": SCALES[name], "out_ptr": "*bf16"}
    signature |= {"bias_ptr": "*bf16", "M": "i32", "N": "i32"}
    aligned = ("x_ptr", "packed_ptr", "scale_ptr", "out_ptr", "bias_ptr", "N")
    constants = gemm_packed.constants(tile, get_format(name), K)
    binary = compile_for(family, gemm_packed.gemm_packed_kernel, signature, constants, aligned, tile.options)
    check_resources(binary, family)
    assert binary.instructions(r"\b(HGMMA|HMMA|UTCHMMA)") > 0


BASES = {
    "none": ("none", 0),
    "smooth": ("smoothed", 0),
    "hadamard": ("hadamard", 32),
    "smooth-hadamard": ("smoothed", 32),
    "learned": ("learned", 64),
    "learned-128": ("learned", 128),
}
JOBS = [
    ("mxfp4", None, "fp8"),
    ("mxfp4", None, "packed"),
    ("hif4", None, "bf16"),
    ("hif4", None, "packed"),
    ("hif4", "mse", "bf16"),
    ("hif4", "mse", "packed"),
    ("hif4", "p2", "fp8"),
]
CASES = [(family, "learned-128", *job) for family in (90, 100, 120) for job in JOBS]
# The other bases and rules: what they add to the code does not depend on the rest; rules are arithmetic, the same on every family.
CASES += [(90, "smooth-hadamard", *job) for job in JOBS]
CASES += [
    (family, basis, *job)
    for family in (90, 100, 120)
    for basis in ("none", "smooth", "hadamard", "smooth-hadamard", "learned")
    for job in (JOBS[0], JOBS[5])
    if (family, basis) != (90, "smooth-hadamard")
]
CASES += [(90, "learned", "mxfp4", rule, "fp8") for rule in get_format("mxfp4").scale_rules[1:]]


def compile_quantize(family, basis, name, rule, out, rows=512, kernel=quantize.quantize_kernel):
    transform, block = BASES[basis]
    scheme = Scheme.of(name, transform=transform, block=block, input_rule=rule)
    values = {"fp8": "*fp8e5", "packed": "*u8", "bf16": "*bf16"}[out]
    signature = {"x_ptr": "*bf16", "basis_ptr": {"smoothed": "*bf16", "learned": "*u8"}.get(transform)}
    signature |= {"values_ptr": values, "scales_ptr": SCALES[name] if out == "packed" else None}
    signature |= {"counters_ptr": None, "M": "i32", "stride_m": "i32", "width": "i32"}
    names = ("x_ptr", "basis_ptr", "values_ptr", "scales_ptr", "stride_m", "width")
    aligned = [name for name in names if signature[name]]
    if kernel is residual.residual_kernel:
        signature, aligned = signature | {"parts_ptr": "*i32"}, [*aligned, "parts_ptr"]
    constants = quantize.constants(scheme, out, torch.bfloat16, K, 0, rows, family)
    if kernel is quantize.quantize_kernel:
        constants["EXTENDED"] = False
    options = quantize.options(scheme, out, constants["L"])
    binary = compile_for(family, kernel, signature, constants, aligned, options)
    check_resources(binary, family)
    return binary


FUSED = {("mxfp4", "fp8"): 2, ("hif4", "mse"): 2 * 9 + 2 * 9 / 4}
"""Fused operations an element: in place for e5m2; two in each of nine trials, and two for the squares of each four."""


@pytest.mark.parametrize(("family", "basis", "name", "rule", "out"), CASES)
def test_quantize(family, basis, name, rule, out):
    binary = compile_quantize(family, basis, name, rule, out)
    products = binary.instructions(r"\b(HGMMA|HMMA|UTCHMMA)")
    assert (products > 0) == (BASES[basis][1] > 0)  # the rotation runs on tensor cores
    # Rounding happens where the reference rounds: nothing is contracted that is not meant to be.
    meant = FUSED.get((name, out), FUSED.get((name, rule), 0))
    found = binary.ptx.count("fma.rn.f32")
    least = 1 if OLDER else meant * ELEMENTS_A_THREAD / 4
    assert found >= least if meant else found == 0  # the smallest tile has a quarter of them
    if out == "fp8":
        assert "cvt.rn.satfinite.e5m2x2.f32" in binary.ptx


@pytest.mark.parametrize(("family", "job"), [(90, JOBS[0]), (90, JOBS[4]), (120, JOBS[1])])
@pytest.mark.parametrize("basis", ["learned", "learned-128"])
def test_residual_blocks(family, job, basis):
    compile_quantize(family, basis, *job, kernel=residual.residual_kernel)


assert quantize.WIDE_TILE // quantize.WIDE_WARPS == quantize.TILE_ELEMENTS // quantize.WARPS
ELEMENTS_A_THREAD = quantize.TILE_ELEMENTS // (32 * quantize.WARPS)
BUDGET = {
    ("mxfp4", "even", "fp8"): {90: (9.9, 10.6), 100: (8.6, 9.0), 120: (10.5, 12)},
    ("hif4", "p2", "fp8"): {90: (14.9, 15.5), 100: (10.5, 10.9), 120: (15.4, 17.1)},
    ("hif4", "reference", "bf16"): {90: (21.2, 22.1), 100: (13.7, 14.2), 120: (20.7, 22.6)},
    ("hif4", "mse", "bf16"): {90: (78.5, 79.5), 100: (53, 54), 120: (79.6, 80)},
}
"""SASS instructions an element with learned blocks of 64 and of 128: as compiled today (triton 3.9.0), with a small margin. The
goals are 12, 20, 24 and 80."""


@pytest.mark.skipif(OLDER, reason="the counts are those of triton 3.9")
@pytest.mark.parametrize("family", [90, 100, 120])
@pytest.mark.parametrize("job", BUDGET)
def test_instructions_an_element(job, family):
    """The loop over row tiles, with loads, the learned block's product and stores: what bounds the speed of a quantizer."""
    for basis, most in zip(("learned", "learned-128"), BUDGET[job][family], strict=True):
        binary = compile_quantize(family, basis, *job, rows=32760)
        loop = binary.loop()
        assert len(loop) / ELEMENTS_A_THREAD <= most
        every = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", binary.sass, re.M))
        assert len(loop) < 0.9 * every  # blocks are decoded before
        work = (r"\bLDGSTS", r"\b(HGMMA|UTCHMMA|HMMA)", r"\bSTG")
        assert all(re.search(one, "\n".join(loop)) for one in work)  # and nothing else is
    if (job[1], family) == ("reference", 90):
        assert "add.rm" in binary.ptx and binary.instructions(r"\bFRND") == 0


@pytest.mark.parametrize(
    ("name", "dtype"), [("mxfp4", "fp8e4nv"), ("mxfp4", "bf16"), ("hif4", "bf16"), ("hif4", "fp8e4nv")]
)
@pytest.mark.parametrize("family", [90, 120])
def test_expand_weight(family, name, dtype):
    signature = {"packed_ptr": "*u8", "scale_ptr": SCALES[name], "out_ptr": f"*{dtype}", "exponent": "i32", "N": "i32"}
    signature |= {"width": "i32"}
    constants = expand_weight.constants(get_format(name), K)
    aligned = ("packed_ptr", "scale_ptr", "out_ptr", "width")
    kernel = expand_weight.expand_kernel
    check_resources(compile_for(family, kernel, signature, constants, aligned, expand_weight.OPTIONS), family)


def test_one_row():
    """An integer argument of 1 is compiled in as a constant: another program, which one row of input would need."""
    tile = lookup("gemm_packed", 90, 1, K, K)
    signature = {"x_ptr": "*bf16", "packed_ptr": "*u8", "scale_ptr": "*u8", "out_ptr": "*bf16", "N": "i32"}
    constants = gemm_packed.constants(tile, get_format("mxfp4"), K) | {"M": 1}
    check_resources(compile_for(90, gemm_packed.gemm_packed_kernel, signature, constants, (), tile.options), 90)
    tile = lookup("gemm_fp8", 90, 1, K, K)
    signature = descriptors(tile, "fp8e5", "fp8e4nv") | {"out_ptr": "*bf16", "factor": "fp32", "N": "i32"}
    constants = gemm_fp8.constants(tile, K) | {"M": 1}
    check_resources(compile_for(90, gemm_fp8.gemm_fp8_kernel, signature, constants, (), tile.options), 90)
    signature = {
        "packed_ptr": "*u8",
        "scale_ptr": "*u8",
        "out_ptr": "*fp8e4nv",
        "row_exponents_ptr": "*i32",
        "width": "i32",
    }
    constants = expand_weight.constants(get_format("mxfp4"), K) | {"exponent": 1, "N": 1}
    check_resources(compile_for(90, expand_weight.expand_kernel, signature, constants, (), expand_weight.OPTIONS), 90)


def test_interpreter_is_off_here():
    """These tests mean nothing if triton was imported for interpretation."""
    assert not sys.modules["triton"].knobs.runtime.interpret
