"""Recipes: what is installed is valid, everything unknown is refused with the key named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from ptq.config import CONFIGS, Recipe, list_configs, load_recipe, load_yaml
from ptq.config.overrides import name_with
from ptq.config.recipe import GONE, GROUPS, NOW_CALLED
from ptq.errors import UsageError
from ptq.quantization.settings import QuantizeSettings
from ptq.scheme import FORMATS, TRANSFORMS, Scheme

TODAY = "scheme: {transform: hadamard, block: 32}\nsolver: {rounding: rtn}"


def recipe(tmp_path: Path, text: str, format_name: str = "mxfp4", *overrides: str) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(str(path), format_name, overrides)


@pytest.mark.parametrize("before", [(), ("solver.tune=true",), ("solver.tune=false",)])
def test_a_key_of_a_group_switches_it_on(tmp_path: Path, before: tuple[str, ...]) -> None:
    for text in (TODAY, TODAY.replace("rtn}", "gptq, tune: true}")):
        found = recipe(tmp_path, text, "mxfp4", "solver.rounding=gptq", *before, "solver.tune.prompts=24")
        assert found.solver.tune is not None and found.solver.tune.prompts == 24 and found.solver.tune.steps == 80


@pytest.mark.parametrize("key", ["solver.tune=true", "solver.tune={steps: 8}"])
def test_a_group_does_not_undo_its_keys(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(key)} would undo --set solver.tune.prompts"):
        recipe(tmp_path, TODAY, "mxfp4", "solver.tune.prompts=24", key)


def test_every_group_of_a_recipe_is_known_as_one() -> None:
    """So that none can be set whole, which would silently drop what the recipe says in it."""
    assert GROUPS == ("scheme", "solver", "records")


def with_settings(recipe: Recipe, format_name: str) -> QuantizeSettings:
    return QuantizeSettings(format_name, recipe, "mine", {})


@pytest.mark.parametrize("name", list_configs("recipes"))
def test_installed_recipes_are_valid(name: str) -> None:
    own = load_yaml(CONFIGS / "recipes" / f"{name}.yaml")
    for format_name in FORMATS:
        if own.get("format") in (None, format_name):
            found = load_recipe(name, format_name)
            assert found.description and found.scheme.transform in TRANSFORMS
            assert with_settings(found, format_name).scheme.format.name == format_name
        else:
            with pytest.raises(UsageError, match=f"made for {own['format']}, but the format is {format_name}"):
                load_recipe(name, format_name)


def test_rtn_uses_nothing_else() -> None:
    plain = load_recipe("rtn", "hif4")
    assert plain == Recipe(description=plain.description)
    settings = with_settings(plain, "hif4")
    assert settings.scheme == Scheme.of("hif4") and not settings.needs_hessian
    assert not settings.needs_records and settings.record_limit == plain.records.for_report


def test_a_recipe_per_format_is_installed() -> None:
    assert {"rtn", "mxfp4", "hif4"} <= set(list_configs("recipes"))


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("scheme.block=32", "scheme.block", 32),
        ("scheme.transform=hadamard", "scheme.transform", "hadamard"),
        ("scheme.input_rule=null", "scheme.input_rule", None),
        ("solver.rounding=rtn", "solver.rounding", "rtn"),
        ("solver.smoothing=[0.3, 0.5]", "solver.smoothing", (0.3, 0.5)),
        ("solver.clip_search=false", "solver.clip_search", False),
        ("solver.damping=0.05", "solver.damping", 0.05),
        ("solver.damping=5e-2", "solver.damping", 0.05),
        ("solver.smoothing=[1E-1, 5.e-1, +25e-2]", "solver.smoothing", (0.1, 0.5, 0.25)),
        ("solver.act_order=false", "solver.act_order", False),
        ("solver.weight_rule=even", "solver.weight_rule", "even"),
        ("records.tokens_per_record=7", "records.tokens_per_record", 7),
        (" records.hessian_tokens =99", "records.hessian_tokens", 99),
        ("records.for_report=1", "records.for_report", 1),
        ("description=mine", "description", "mine"),
    ],
)
def test_set_changes_one_key(override: str, path: str, value: object) -> None:
    changed, before = (load_recipe("mxfp4", "mxfp4", given).model_dump() for given in ((override,), ()))
    node, old = changed, before
    *groups, leaf = path.split(".")
    for group in groups:
        node, old = node[group], old[group]
    assert node[leaf] == value != old[leaf]
    node[leaf] = old[leaf]
    assert changed == before


def test_later_overrides_win_over_earlier_and_over_the_file(tmp_path: Path) -> None:
    text = "scheme: {transform: hadamard, block: 16}"
    assert recipe(tmp_path, text, "mxfp4", "scheme.block=32", "scheme.block=128").scheme.block == 128
    solver = recipe(tmp_path, "solver: {damping: 0.5}", "mxfp4", "solver.act_order=false").solver
    assert (solver.damping, solver.act_order) == (0.5, False)


def test_a_changed_recipe_does_not_go_by_its_name_alone() -> None:
    assert name_with("hif4", ()) == "hif4"
    changes = ("solver.tune=true", " solver.residual =0.1", "solver.tune=false")
    assert name_with("hif4", changes) == "hif4 (changed: solver.tune, solver.residual)"


def test_blocks_follow_the_transform(tmp_path: Path) -> None:
    """Without a transform there are none; a transform that is asked for has the default's size."""
    assert load_recipe("mxfp4", "mxfp4", ("scheme.transform=none",)).scheme.block == 0
    assert load_recipe("rtn", "mxfp4").scheme.block == 0 == Recipe().scheme.block
    hadamard = load_recipe("rtn", "mxfp4", ("scheme.transform=hadamard",))
    assert hadamard.scheme.block == 64
    assert with_settings(hadamard, "mxfp4").scheme == Scheme.of("mxfp4", transform="hadamard", block=64)
    smoothed = load_recipe("rtn", "mxfp4", ("scheme.transform=smoothed", "scheme.block=0", "solver.smoothing=[0.5]"))
    assert with_settings(smoothed, "mxfp4").scheme == Scheme.of("mxfp4", transform="smoothed")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("scheme.transform=hadamard", "scheme.block=48"), "48 is not supported; choose one of"),
        (("scheme.transform=hadamard", "scheme.block=0"), "0 is not supported"),
        (("scheme.transform=learned", "scheme.block=32"), r"found blocks of 32\. Set scheme\.block to 64 or 128"),
        (("scheme.transform=rotated",), "Unknown transform 'rotated'; choose one of none, hadamard"),
        (("scheme.input_rule=max",), "hif4 has no scale rule 'max'; choose one of reference, mse"),
        (("solver.smoothing=[0.5]",), "the transform none does not try exponents of smoothing"),
        (("scheme.transform=smoothed",), "the transform smoothed has no exponents to try"),
    ],
)
def test_schemes_that_do_not_fit_the_format_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_settings(load_recipe("rtn", "hif4", overrides), "hif4")


@pytest.mark.parametrize("key", [*NOW_CALLED, *GONE])
@pytest.mark.parametrize("where", ["file", "--set"])
def test_keys_of_an_earlier_version_are_refused_with_todays_name(tmp_path: Path, key: str, where: str) -> None:
    *groups, leaf = key.split(".")
    text, overrides = "description: mine", [f"{key}=16"]
    if where == "file":
        text, overrides = f"{groups[0]}: {{{leaf}: 16}}" if groups else f"{leaf}: 16", []
    message = f"{re.escape(key)} is gone" if key in GONE else f"{re.escape(key)} is now called {NOW_CALLED[key]}"
    with pytest.raises(UsageError, match=message) as caught:
        recipe(tmp_path, text, "mxfp4", *overrides)
    assert ("none, hadamard, smoothed or learned" in str(caught.value)) == (key in ("learned_transform", "rotation"))


def test_all_earlier_keys_are_named_at_once(tmp_path: Path) -> None:
    text = "rounding: gptq\nrotation: 64\nactivations: {ties: even, scale_rule: mse}"
    message = "rounding is now called .*rotation is now called .*activations.scale_rule is now called .*ties is gone"
    with pytest.raises(UsageError, match=message):
        recipe(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("shceme=32", "shceme"),
        ("solver.dampnig=1", r"solver\.dampnig"),
        ("scheme.block=-1", r"scheme\.block.*-1"),
        ("scheme.block=many", r"scheme\.block.*many"),
        ("scheme.transform=3", r"scheme\.transform"),
        ("solver.damping=0", r"solver\.damping"),
        ("solver.damping=much", "much"),
        ("solver.rounding=awq", "awq"),
        ("records.tokens_per_record=0", r"records\.tokens_per_record"),
        ("solver.damping", "key=value"),
        ("scheme.block.size=32", "block is not a group"),
        ("solver.rounding.kind=x", "rounding is not a group"),
        ("solver=3", "solver would replace a whole group"),
        ("solver={residual: 0.05}", r"as --set solver\.KEY=VALUE"),
        (" scheme =null", "scheme would replace a whole group"),
        ("records={}", "records would replace a whole group"),
        ("=3", "."),
        ("solver.smoothing=[0.5", "smoothing"),
    ],
)
def test_wrong_override_is_refused_by_name(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(tmp_path, TODAY, "mxfp4", override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should hold a mapping"),
        ("- a", "should hold a mapping, found|should hold a mapping of settings, found list"),
        ("a: [", "not valid YAML"),
        ("solver: {}\nclip: true", r"clip.*Known keys: .*scheme, solver, records"),
        ("solver: {clip: true}", r"solver\.clip"),
        ("solver: 3", "solver"),
        ("format: int8", "format"),
    ],
)
def test_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(tmp_path, text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no recipe 'nothing'.*rtn"):
        load_recipe("nothing", "mxfp4")
    with pytest.raises(UsageError, match="Could not read"):
        load_recipe(str(tmp_path), "mxfp4")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.yaml"):
        load_recipe(str(tmp_path / "binary.yaml"), "mxfp4")


@pytest.mark.parametrize(
    ("key", "hessian"),
    [
        ("solver.rounding=gptq", True),
        ("solver.clip_search=true", True),
        ("scheme.transform=learned", True),
        ("scheme.transform=smoothed solver.smoothing=[0.5]", False),
    ],
)
def test_what_needs_records_says_so(key: str, hessian: bool) -> None:
    settings = with_settings(load_recipe("rtn", "mxfp4", tuple(key.split())), "mxfp4")
    assert settings.needs_records and settings.record_limit is None and settings.needs_hessian == hessian


@pytest.mark.parametrize("key", ["scheme.transform=hadamard", "scheme.input_rule=even", "solver.weight_rule=mse"])
def test_what_needs_no_records_asks_for_none(key: str) -> None:
    settings = with_settings(load_recipe("rtn", "mxfp4", (key, "records.for_report=5")), "mxfp4")
    assert not settings.needs_records and settings.record_limit == 5


def test_recipes_do_not_change_after_validation() -> None:
    with pytest.raises(ValidationError):
        load_recipe("rtn", "mxfp4").format = "hif4"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        load_recipe("rtn", "mxfp4").scheme.block = 16  # type: ignore[misc]


@pytest.mark.parametrize(
    "overrides", [("scheme.block=64",), ("scheme.block=abc",), ("scheme.transform=none", "scheme.block=64")]
)
def test_blocks_without_a_transform_are_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"blocks of (64|'abc') without a transform.*scheme\.transform"):
        load_recipe("rtn", "hif4", overrides)


@pytest.mark.parametrize("value", [".nan", ".inf", "-3", "9", "true"])
def test_exponents_of_smoothing_are_numbers_from_0_to_1(value: str) -> None:
    with pytest.raises(UsageError, match=r"solver\.smoothing\.0"):
        load_recipe("hif4", "hif4", (f"solver.smoothing=[{value}]",))


@pytest.mark.parametrize("override", ["solver.damping=true", "records.for_report=true", "scheme.block='64'"])
def test_one_type_is_not_taken_for_another(override: str) -> None:
    with pytest.raises(UsageError, match=override.partition("=")[0].replace(".", r"\.")):
        load_recipe("hif4", "hif4", (override,))
