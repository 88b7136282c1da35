"""Equality with the organisers' reference, and the byte layout, exactly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptq.formats import FORMATS, Codes, get

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = (
    *("gauss", "student_t3", "channel_outliers", "lognormal_rows", "tiny", "large", "ties", "zero_groups"),
    "bf16_maxima",
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMATS)
def test_golden_vectors(name, case):
    vectors, fmt = load_file(GOLDEN / f"{name}.safetensors"), get(name)
    x, values = vectors[f"{case}.input"], vectors[f"{case}.dequantized"]
    packed, scale = vectors[f"{case}.weight_packed"], vectors[f"{case}.weight_scale"]
    for found_packed, found_scale in (fmt.pack(fmt.quantize(x)), fmt.quantize_and_pack(x)):
        assert found_packed.numpy().tobytes() == packed.numpy().tobytes()
        assert found_scale.numpy().tobytes() == scale.numpy().tobytes()
        assert found_scale.dtype == scale.dtype
    assert torch.equal(fmt.dequantize(fmt.unpack(packed, scale)), values)
    assert torch.equal(fmt.fake_quantize(x.float()), values)
    assert torch.equal(fmt.fake_quantize(x).float(), values)  # bfloat16 holds every value exactly


def test_golden_byte():
    x = torch.zeros(32)
    x[0], x[1] = 6.0, 1.0
    packed, scale = get("mxfp4").pack(get("mxfp4").quantize(x))
    assert packed[0].item() == 0x27 and scale.tolist() == [127]


def test_hif4_word_layout():
    """S = 1 at byte 192; e8 bit 3 is bit 11, e16 bit 6 is bit 22, and bit 31 makes the int32 negative."""
    fmt = get("hif4")
    word = 192 | 1 << 11 | 1 << 22 | 1 << 31
    scales = torch.tensor([[word - 2**32]], dtype=torch.int32)
    values = fmt.dequantize(Codes(torch.full((1, 64), 4, dtype=torch.uint8), scales))[0]
    expected = torch.ones(64)
    expected[24:32] = 2.0
    expected[24:28] = 4.0
    expected[60:64] = 2.0
    assert torch.equal(values, expected)
