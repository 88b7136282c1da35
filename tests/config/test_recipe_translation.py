"""A recipe as manifests held it before recipes had groups says the same in today's keys; what cannot be said comes back beside it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ptq.config import Recipe, load_recipe
from ptq.config.recipe import translate
from ptq.quantization.settings import QuantizeSettings
from ptq.scheme import Scheme

EARLIER_RTN: dict[str, Any] = {
    "description": "Plain rounding to nearest, the baseline that every other recipe is compared with.",
    "format": None,
    "rounding": "rtn",
    "rotation": 0,
    "smoothing": [],
    "learned_transform": False,
    "clip_search": False,
    "bias_correction": False,
    "weight_scale_rule": None,
    "gptq": {"damping": 0.03, "act_order": True, "precision": "float32"},
    "activations": {"scale_rule": None, "ties": None},
    "records": {
        "weighting": "d_sigma2",
        "inputs": "original",
        "tokens_per_record": 128,
        "hessian_tokens": None,
        "for_report": 2,
    },
}
"""The recipe `rtn`, whole, as manifests held it."""
TUNED = {
    "rounding": "gptq",
    "rotation": 64,
    "learned_transform": True,
    "clip_search": True,
    "records.weighting": "uniform",
}
DEFAULTS = {
    "hif4": TUNED
    | {
        "description": "The default for HiF4. Every key was measured, see docs/quality.md.",
        "format": "hif4",
        "activations.scale_rule": "mse",
    },
    "mxfp4": TUNED
    | {
        "description": "The default for MXFP4. Every key was measured, see docs/quality.md.",
        "format": "mxfp4",
        "activations.scale_rule": "even",
    },
}


def earlier(changes: dict[str, Any]) -> dict[str, Any]:
    value = copy.deepcopy(EARLIER_RTN)
    for key, change in changes.items():
        group, _, name = key.rpartition(".")
        (value[group] if group else value)[name] = change
    return value


def scheme(recipe: Recipe, format_name: str) -> Scheme:
    return QuantizeSettings(format_name, recipe, "mine", {}).scheme


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_recipes_are_todays_but_for_larger_blocks(name: str) -> None:
    value, lost = translate(earlier(DEFAULTS[name]))
    today = load_recipe(name, name, ("scheme.block=64",))
    assert load_recipe(name, name).scheme.block == 128
    assert Recipe.model_validate(value | {"description": today.description}) == today  # it decides nothing
    assert lost == {}


@pytest.mark.parametrize("format_name", ["mxfp4", "hif4"])
def test_rtn_is_todays_whatever_weighed_records_that_it_does_not_read(format_name: str) -> None:
    value, lost = translate(EARLIER_RTN)
    assert EARLIER_RTN["records"]["weighting"] == "d_sigma2"
    assert Recipe.model_validate(value) == load_recipe("rtn", format_name) and lost == {}
    assert translate(earlier({"records.weighting": "uniform"})) == (value, {})


@pytest.mark.parametrize("reads", [{"rounding": "gptq"}, {"clip_search": True}, {"smoothing": [0.5]}])
def test_the_weighting_of_records_that_were_read_is_returned(reads: dict[str, Any]) -> None:
    assert translate(earlier(reads))[1] == {"records.weighting": "d_sigma2"}


def test_neither_of_today_nor_of_then_is_left_to_validation() -> None:
    for value in ({"rotation": 64, "scheme": 3}, {"rounding": "rtn", "records": None}):
        assert translate(value) == (value, {})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Scheme.of("mxfp4")),
        ({"rotation": 32}, Scheme.of("mxfp4", transform="hadamard", block=32)),
        ({"rotation": 32, "smoothing": [0.4, 0.5]}, Scheme.of("mxfp4", transform="smoothed", block=32)),
        ({"smoothing": [0.5]}, Scheme.of("mxfp4", transform="smoothed", block=0)),
        ({"rotation": 64, "learned_transform": True}, Scheme.of("mxfp4", transform="learned", block=64)),
        (
            {"rotation": 128, "smoothing": [0.5], "learned_transform": True},
            Scheme.of("mxfp4", transform="learned", block=128),
        ),
        ({"activations.scale_rule": "qmax7.25"}, Scheme.of("mxfp4", input_rule="qmax7.25")),
    ],
)
def test_the_change_of_basis_is_kept(changes: dict[str, Any], expected: Scheme) -> None:
    value, lost = translate(earlier(changes))
    recipe = Recipe.model_validate(value)
    assert scheme(recipe, "mxfp4") == expected and lost.keys() <= {"records.weighting"}
    assert recipe.solver.smoothing == tuple(changes.get("smoothing", ()))


@pytest.mark.parametrize(
    ("key", "group", "name", "change"),
    [
        ("rounding", "solver", "rounding", "gptq"),
        ("smoothing", "solver", "smoothing", (0.3, 0.5)),
        ("clip_search", "solver", "clip_search", True),
        ("weight_scale_rule", "solver", "weight_rule", "mse"),
        ("gptq.damping", "solver", "damping", 0.5),
        ("gptq.act_order", "solver", "act_order", False),
        ("activations.scale_rule", "scheme", "input_rule", "ceil"),
        ("records.tokens_per_record", "records", "tokens_per_record", 7),
        ("records.hessian_tokens", "records", "hessian_tokens", 9),
        ("records.for_report", "records", "for_report", 1),
    ],
)
def test_every_other_key_is_kept(key: str, group: str, name: str, change: Any) -> None:
    found, before = (Recipe.model_validate(translate(earlier(given))[0]) for given in ({key: change}, {}))
    assert getattr(getattr(found, group), name) == change != getattr(getattr(before, group), name)
    if key == "smoothing":
        assert found.scheme.transform == "smoothed"
        return
    same = found.model_copy(
        update={group: getattr(found, group).model_copy(update={name: getattr(getattr(before, group), name)})}
    )
    assert same == before


def test_what_cannot_be_said_is_returned_and_changes_nothing_else() -> None:
    gone = {
        "bias_correction": True,
        "gptq.precision": "float64",
        "activations.ties": "away",
        "records.weighting": "d_sigma2",
        "records.inputs": "propagated",
    }
    value, lost = translate(earlier({"rounding": "gptq", **gone}))
    assert lost == gone
    assert value == translate(earlier({"rounding": "gptq"}))[0]


def test_todays_recipes_come_back_as_they_are() -> None:
    for recipe in (Recipe(), load_recipe("hif4", "hif4"), load_recipe("rtn", "hif4", ("solver.smoothing=[0.5]",))):
        for mode in ("json", "python"):
            assert translate(recipe.model_dump(mode=mode)) == (recipe.model_dump(mode=mode), {})
    assert translate({}) == ({}, {})


def test_a_translated_recipe_is_todays() -> None:
    value = translate(earlier(DEFAULTS["hif4"]))[0]
    assert translate(value) == (value, {})


def test_the_argument_is_left_alone() -> None:
    value = earlier({"rotation": 32, "bias_correction": True})
    before = copy.deepcopy(value)
    translate(value)
    assert value == before
