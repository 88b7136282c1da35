"""Recipes: what is installed is valid, everything unknown is refused with the key named."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from ptq.config import CONFIGS, Recipe, list_configs, load_recipe, load_yaml
from ptq.errors import UsageError


def recipe(tmp_path: Path, text: str, format_name: str = "mxfp4", *overrides: str) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(str(path), format_name, overrides)


@pytest.mark.parametrize("name", list_configs("recipes"))
def test_installed_recipes_are_valid(name: str) -> None:
    own = load_yaml(CONFIGS / "recipes" / f"{name}.yaml")
    for format_name in ("mxfp4", "hif4"):
        if own.get("format") in (None, format_name):
            assert load_recipe(name, format_name).description
        else:
            with pytest.raises(UsageError, match=f"made for {own['format']}, but --format is {format_name}"):
                load_recipe(name, format_name)


def test_rtn_uses_nothing_else() -> None:
    plain = load_recipe("rtn", "hif4")
    assert plain == Recipe(description=plain.description) and not plain.needs_records


def test_a_recipe_per_format_is_installed() -> None:
    assert {"rtn", "mxfp4", "hif4"} <= set(list_configs("recipes"))


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("rotation=64", "rotation", 64),
        ("rounding=gptq", "rounding", "gptq"),
        ("smoothing=[0.3, 0.5]", "smoothing", (0.3, 0.5)),
        ("gptq.damping=0.05", "gptq.damping", 0.05),
        ("gptq.act_order=false", "gptq.act_order", False),
        ("activations.scale_rule=even", "activations.scale_rule", "even"),
        ("weight_scale_rule=null", "weight_scale_rule", None),
        (" records.inputs =propagated", "records.inputs", "propagated"),
    ],
)
def test_set_changes_one_key(override: str, path: str, value: object) -> None:
    changed, before = load_recipe("rtn", "mxfp4", (override,)).model_dump(), load_recipe("rtn", "mxfp4").model_dump()
    node, old = changed, before
    *groups, leaf = path.split(".")
    for group in groups:
        node, old = node[group], old[group]
    assert node[leaf] == value
    node[leaf] = old[leaf]
    assert changed == before


def test_later_overrides_win_over_earlier_and_over_the_file(tmp_path: Path) -> None:
    assert recipe(tmp_path, "rotation: 16", "mxfp4", "rotation=32", "rotation=128").rotation == 128
    assert recipe(tmp_path, "gptq: {damping: 0.5}", "mxfp4", "gptq.act_order=false").gptq.damping == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rotatoin=32", "rotatoin"),
        ("gptq.dampnig=1", r"gptq\.dampnig"),
        ("rotation=48", "rotation.*48"),
        ("gptq.damping=0", r"gptq\.damping"),
        ("gptq.damping=much", "much"),
        ("rounding=awq", "awq"),
        ("rotation", "key=value"),
        ("rotation.size=32", "not a group"),
        ("rounding.kind=x", "not a group"),
        ("gptq=3", "gptq"),
        ("=3", "."),
        ("smoothing=[0.5", "smoothing"),
    ],
)
def test_wrong_override_is_refused_by_name(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(tmp_path, "rotation: 32\nrounding: rtn", "mxfp4", override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should hold a mapping"),
        ("- a", "should hold a mapping, found|should hold a mapping of settings, found list"),
        ("a: [", "not valid YAML"),
        ("rotation: 32\nclip: true", r"clip.*Known keys: .*clip_search"),
        ("gptq: 3", "gptq"),
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


@pytest.mark.parametrize("key", ["rounding=gptq", "smoothing=[0.5]", "clip_search=true", "bias_correction=true"])
def test_what_needs_records_says_so(key: str) -> None:
    assert load_recipe("rtn", "mxfp4", (key,)).needs_records


def test_recipes_do_not_change_after_validation() -> None:
    with pytest.raises(ValidationError):
        load_recipe("rtn", "mxfp4").rotation = 16  # type: ignore[misc]
