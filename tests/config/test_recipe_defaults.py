"""The default of a recipe key is written once, in ptq/config/recipe.py: a second one would drift from it.

Before, `damping` was 0.03 in the recipe and 0.01 in the solvers, so that `factorize(h)` was not what a recipe does.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptq
from ptq.config.recipe import RecordSettings, SchemeSettings, SolverSettings

PACKAGE = Path(ptq.__file__).parent
HOME = PACKAGE / "config" / "recipe.py"
KEYS = {name for group in (SchemeSettings, SolverSettings, RecordSettings) for name in group.model_fields}
NEUTRAL = {"transform": {"UNCHANGED", "UNCHANGED.kind"}, "block": {"0"}, "residual": {"()"}}
"""Besides None: that nothing is done is no choice of a value."""


def defaults(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """(name, default) of every parameter, class field, constant and look-up with a fallback."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            positional = [*arguments.posonlyargs, *arguments.args]
            with_default = positional[len(positional) - len(arguments.defaults) :]
            yield from ((one.arg, value) for one, value in zip(with_default, arguments.defaults, strict=True))
            keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            yield from ((one.arg, value) for one, value in keywords if value is not None)
        elif isinstance(node, ast.ClassDef | ast.Module):
            for line in node.body:
                targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
                value = getattr(line, "value", None)
                if isinstance(line, ast.Assign | ast.AnnAssign) and value is not None:
                    yield from ((target.id, inner(value)) for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = node.args[-2:] if function in ("get", "getattr", "pop", "setdefault") else []
            if len(given) == 2 and isinstance(given[0], ast.Constant) and isinstance(given[0].value, str):
                yield given[0].value, given[1]


def inner(value: ast.expr) -> ast.expr:
    """The default inside `Field(default=...)`, `Field(...)` or `field(default=...)`."""
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") in ("Field", "field"):
        named = [one.value for one in value.keywords if one.arg == "default"]
        return next(iter(named or value.args), ast.Constant(None))
    return value


def second_defaults(source: str) -> list[str]:
    """ "name = value" of every default that belongs into a recipe."""
    found = []
    for name, value in defaults(ast.parse(source)):
        key, text = name.lower().removeprefix("default_"), ast.unparse(value)
        if name == "BLOCK":  # how much is computed at a time is called so too
            continue
        if key in KEYS and text != "None" and text not in NEUTRAL.get(key, ()):
            found.append(f"{name} = {text}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_defaults_of_recipe_keys_are_written_once(path: Path) -> None:
    if path != HOME:
        assert second_defaults(path.read_text(encoding="utf-8")) == []


def test_the_recipe_itself_is_where_they_are() -> None:
    home = second_defaults(HOME.read_text(encoding="utf-8"))
    assert {line.split(" = ")[0] for line in home} >= {"damping", "act_order", "rounding", "tokens_per_record", "block"}
    assert {"damping", "act_order", "rounding", "clip_search", "tokens_per_record", "block", "input_rule"} <= KEYS


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def factorize(h, *, damping: float = 0.01): ...", "damping = 0.01"),
        ("def solve(w, rounding='gptq', *, other=1): ...", "rounding = 'gptq'"),
        ("async def f(a, /, act_order=False): ...", "act_order = False"),
        ("g = lambda clip_search=True: clip_search", "clip_search = True"),
        ("class S:\n    damping: float = 0.01", "damping = 0.01"),
        ("class S:\n    def f(self, tokens_per_record=64): ...", "tokens_per_record = 64"),
        ("class S(BaseModel):\n    block: int = Field(default=32, ge=0)", "block = 32"),
        ("class S(BaseModel):\n    block: int = Field(32)", "block = 32"),
        ("class S:\n    smoothing: tuple = field(default=(0.5,))", "smoothing = (0.5,)"),
        ("class S:\n    transform: str = 'hadamard'", "transform = 'hadamard'"),
        ("DAMPING = 0.01", "DAMPING = 0.01"),
        ("DEFAULT_DAMPING: float = 0.01", "DEFAULT_DAMPING = 0.01"),
        ("DEFAULT_BLOCK = 32", "DEFAULT_BLOCK = 32"),
        ("def f(v):\n    return v.get('damping', 0.01)", "damping = 0.01"),
        ("def f(v):\n    return getattr(v, 'input_rule', 'mse')", "input_rule = 'mse'"),
    ],
)
def test_a_second_default_would_be_found(source: str, found: str) -> None:
    assert second_defaults(source) == [found]


@pytest.mark.parametrize(
    "source",
    [
        "def f(h, *, damping: float, act_order: bool): ...",
        "def f(block=0, input_rule=None): ...",
        "class S:\n    damping: float | None = None\n    rounding: str",
        "class S:\n    damping: float | None = Field(default=None, gt=0)",
        "class S:\n    transform: Transform = UNCHANGED",
        "BLOCK = 1024",
        "def f():\n    block = 7\n    return g(damping=0.5, block=block)",
    ],
)
def test_values_in_use_are_no_defaults(source: str) -> None:
    assert second_defaults(source) == []
