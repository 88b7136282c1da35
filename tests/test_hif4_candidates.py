"""scripts/hif4_candidates.py: its candidates do what they are called, in layers and solvers as they are today."""

from __future__ import annotations

import pytest
import torch
from hif4_candidates import INPUT_SEARCHES, MAXIMUM_EXPONENT, POWER_OF_TWO, Candidate, Rule, known_as

from ptq.config import load_recipe
from ptq.quantization.settings import QuantizeSettings
from ptq.scheme import Scheme, get_format


@pytest.mark.parametrize(
    "rule, same", [(INPUT_SEARCHES["bytes 0..+2, free"], "mse"), (MAXIMUM_EXPONENT, "p2"), (None, "reference")]
)
@pytest.mark.parametrize("rows", [3, 48])
def test_inputs_of_a_layer_have_the_scales_of_the_candidate(rule: Rule | None, same: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, blocks = torch.randn(rows, 192, generator=generator), torch.randn(3, 64, 64, generator=generator)
    with known_as({"a candidate": Candidate("a candidate", None, rule)}):
        recipe = load_recipe("hif4", "hif4", ("scheme.input_rule=reference",))
        scheme = QuantizeSettings("a candidate", recipe, "a candidate", {}).scheme
        found = scheme.quantize_input(x, blocks)
    expected = Scheme.of("hif4", transform="learned", block=64, input_rule=same).quantize_input(x, blocks)
    assert torch.equal(found, expected)


def test_weights_have_power_of_two_scales() -> None:
    w, importance = torch.randn(8, 192, generator=torch.Generator().manual_seed(0)), torch.rand(192) + 0.1
    found = Candidate("a candidate", POWER_OF_TWO).search_scales(w, importance)
    assert torch.equal(found, get_format("hif4").search_scales(w, importance, "p2"))
