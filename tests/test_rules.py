"""The rules of the challenge: what they say, and that a format without a rule is measured but not judged."""

from __future__ import annotations

import pytest

from ptq import formats, known
from ptq.config import load_recipe
from ptq.errors import UsageError
from ptq.quantization.settings import QuantizeSettings
from ptq.rules import LIMITS_IN_WORDS, RULES, block_budget, check_budget, loss_limit


def test_the_rules_are_those_of_the_challenge() -> None:
    assert (block_budget("hif4"), loss_limit("hif4")) == (2, 0.005)
    assert (block_budget("mxfp4"), loss_limit("mxfp4")) == (5, 0.01)
    assert set(RULES) <= set(formats.FORMATS) and "hif4 (limit 0.5 %)" in LIMITS_IN_WORDS


def test_another_format_has_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known.FORMATS, "int4", known.KnownFormat("INT4", 32, known.FORMATS["mxfp4"].scale_rules))
    assert block_budget("int4") is None and loss_limit("int4") is None
    check_budget("int4", {"transformer": dict.fromkeys(range(40), "all of them")}, "total")
    with pytest.raises(UsageError, match=r"no rule for int4\. Name the blocks"):
        QuantizeSettings("int4", load_recipe("rtn", "mxfp4"), "rtn", {}, auto_protect=True)


@pytest.mark.parametrize(("scope", "allowed"), [("total", False), ("per-expert", True)])
def test_the_budget_counts_as_the_scope_says(scope: str, allowed: bool) -> None:
    protected = {expert: {0: "named", 1: "named"} for expert in ("transformer", "transformer_2")}
    if allowed:
        check_budget("hif4", protected, scope)
    else:
        with pytest.raises(UsageError, match=r"4 blocks .* counted total; hif4 allows at most 2.*per-expert"):
            check_budget("hif4", protected, scope)
