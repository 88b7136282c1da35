"""The direction of imports, as docs/architecture.md states it, checked on the syntax trees of every file.

Imports inside functions count too; imports under `if TYPE_CHECKING` do not (they build no dependency at run time).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ptq"

BASE = {"errors", "limits", "version", "ui", "store", "rules", "known"}
STAGES = {"calibration", "quantization", "generation", "evaluation"}
LOWER = {"scheme", "solvers", "config", "prompts", "runtime", "checkpoint", "tiny", "wan"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "limits": set(),
    "version": set(),
    "ui": {"errors"},
    "store": {"ui", "errors", "limits"},
    "rules": {"errors"},
    "known": {"errors"},
    "scheme": {"errors", "known"},
    "formats": {"scheme", "errors"},
    "config": {"errors", "limits", "known"},
    "solvers": {"scheme", "config", "errors"},
    "prompts": {"config", *BASE},
    "runtime": {"scheme", "config", *BASE},
    "checkpoint": {"runtime", "scheme", "config", *BASE},
    "tiny": BASE,
    "wan": {"checkpoint", "runtime", "scheme", "config", "tiny", *BASE},
    "calibration": {*LOWER, *BASE},
    "quantization": {*LOWER, *BASE},
    "generation": {*LOWER, *BASE},
    "evaluation": {*LOWER, *BASE},
    "report": {*LOWER, *BASE},
    "submission": {*LOWER, *BASE, "report"},
}
"""Top-level name below ptq -> the others that it may import. cli and __init__ are the top: they may import all."""

TOP = {"cli", "__init__"}
SEAMS = {
    "report": {f"ptq.evaluation.{name}" for name in ("frames", "overlap", "runs", "statistics", "suites")}
    | {"ptq.generation.video"},
    "submission": {"ptq.generation"}
    | {
        f"ptq.evaluation.{name}"
        for name in ("conclude", "findings", "overlap", "pairs", "runs", "scores", "statistics", "suites")
    }
    | {"ptq.evaluation.vbench.totals"},
}
"""Modules of the stages whose meaning (not whose files: those have schemas in store) is shared: the report shows videos and
words of measures; `ptq verify` generates a unit, measures it and computes the evaluation again."""
DIFFUSERS_ONLY_IN = ("wan/", "checkpoint/diffusers_quantizer.py", "cli/common.py")

FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(relative: Path) -> str:
    """ptq/wan/replay.py -> wan; ptq/errors.py -> errors."""
    return relative.parts[0].removesuffix(".py")


def is_type_checking(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import that runs; `from a import b` gives both a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and is_type_checking(node):
            for other in node.orelse:
                yield from imported_modules(other)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: imports are absolute here"
            assert node.module is not None
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        else:
            yield from imported_modules(node)


def imports_of(file: Path) -> list[tuple[int, str]]:
    return list(imported_modules(ast.parse(file.read_text(encoding="utf-8"))))


def violations(file: Path, relative: Path) -> list[str]:
    layer = layer_of(relative)
    if layer in TOP:
        return []
    found = []
    for line, module in imports_of(file):
        parts = module.split(".")
        if parts[0] != "ptq" or len(parts) < 2 or parts[1] == layer:
            continue
        seam = any(f"{module}.".startswith(f"{name}.") for name in SEAMS.get(layer, ()))
        if parts[1] not in MAY_IMPORT[layer] and not seam:
            found.append(f"{relative}:{line} imports {module}")
    return found


def test_every_folder_has_a_place_in_the_table() -> None:
    layers = {layer_of(file.relative_to(PACKAGE)) for file in FILES}
    assert len(layers) > 10
    assert layers - TOP - set(MAY_IMPORT) == set()


def test_the_table_has_no_cycle() -> None:
    order = list(MAY_IMPORT)
    for layer, allowed in MAY_IMPORT.items():
        later = [name for name in allowed if name in order and order.index(name) >= order.index(layer)]
        assert not (set(later) - {"errors", "limits", "store", "ui", "version", "rules", "known"}), (layer, later)
        assert layer not in allowed


def test_imports_point_down() -> None:
    found = [text for file in FILES for text in violations(file, file.relative_to(PACKAGE))]
    assert not found, "\n".join(sorted(set(found)))


def module_of(relative: Path) -> str:
    """wan/replay.py -> ptq.wan.replay; wan/__init__.py -> ptq.wan."""
    return ".".join(["ptq", *relative.with_suffix("").parts]).removesuffix(".__init__")


def needed_modules(file: Path, modules: Collection[str]) -> set[str]:
    """Which of `modules` a file imports; `from a import b` needs a.b where that is a module, and else a."""
    found = imports_of(file)
    parts = {(line, one): [m for at, m in found if at == line and m.startswith(f"{one}.")] for line, one in found}
    return {one for (_, one), names in parts.items() if one in modules and not (names and set(names) <= set(modules))}


def circles(files: dict[str, Path]) -> list[str]:
    """What is left of the imports between modules (name -> file) when no more ends can be taken off: only circles."""
    left = {name: needed_modules(file, files) - {name} for name, file in files.items()}
    while ends := {name for name, wanted in left.items() if not wanted} | (set(left) - set().union(*left.values())):
        left = {name: wanted - ends for name, wanted in left.items() if name not in ends}
    return sorted(f"{name} needs {', '.join(sorted(wanted))}" for name, wanted in left.items())


def test_modules_import_each_other_without_a_circle() -> None:
    """At the top of a file and inside functions: a circle is not cured by an import that runs later."""
    found = circles({module_of(file.relative_to(PACKAGE)): file for file in FILES})
    assert not found, "\n".join(found)


def test_the_check_for_circles_finds_one(tmp_path: Path) -> None:
    texts = {
        "ptq.a": "def f():\n    from ptq.b import g",
        "ptq.b": "from ptq import c",
        "ptq.c": "from typing import TYPE_CHECKING\nimport ptq.a",
        "ptq.d": "from ptq.a import f",
    }
    files = {name: tmp_path / f"{name}.py" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text)
    assert [text.split()[0] for text in circles(files)] == ["ptq.a", "ptq.b", "ptq.c"]
    files["ptq.c"].write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ptq.a")
    assert circles(files) == []


def test_only_the_adapter_knows_diffusers() -> None:
    found = []
    for file in FILES:
        relative = file.relative_to(PACKAGE).as_posix()
        if relative.startswith(DIFFUSERS_ONLY_IN):
            continue
        found += [f"{relative}:{line}" for line, module in imports_of(file) if module.split(".")[0] == "diffusers"]
    assert not found, "\n".join(sorted(set(found)))


FAMILY_NAME = re.compile(
    r"transformer(_2)?|attn[12]\..*|ffn\.net\..*|(T2V|I2V|TI2V)-\d?.*B|Wan\w*(Pipeline|Model)|boundary_ratio|blocks\."
)
"""Strings that name a module, an expert, a variant or a class of the model family, as code compares or looks them up."""


def test_only_the_family_knows_its_names() -> None:
    """Everything outside ptq/wan asks it, so that another variant costs an entry there and a preset."""
    found = []
    for file in FILES:
        relative = file.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and FAMILY_NAME.fullmatch(node.value):
                found += [f"{relative}:{node.lineno} {node.value!r}"] if not relative.startswith("wan/") else []
    assert not found, "\n".join(sorted(found))


def test_the_command_line_imports_stages_inside_its_functions() -> None:
    """At the top of ptq/cli/*.py only light modules: `ptq --help` answers at once."""
    light = {"ptq.known", "ptq.errors", "ptq.version", "ptq.cli", "ptq.ui", "ptq.rules"}
    found = []
    for file in sorted((PACKAGE / "cli").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for line, module in (
                imported_modules(ast.Module([node], [])) if isinstance(node, (ast.Import, ast.ImportFrom)) else ()
            ):
                if module.startswith("ptq.") and ".".join(module.split(".")[:2]) not in light:
                    found.append(f"{file.name}:{line} imports {module}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "bad"),
    [
        ("formats/x.py", "from ptq.solvers import rtn", True),
        ("formats/x.py", "from ptq import solvers", True),
        ("formats/x.py", "def f():\n    import ptq.wan.loading", True),
        ("formats/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ptq.wan import loading", False),
        ("quantization/x.py", "from ptq.store.records import Record", False),
        ("quantization/x.py", "from ptq.calibration.run import calibrate", True),
        ("generation/x.py", "from ptq.evaluation import runs", True),
        ("report/x.py", "from ptq.evaluation.runs import read_run", False),
        ("report/x.py", "from ptq.evaluation.evaluate import evaluate_runs", True),
        ("submission/x.py", "from ptq.quantization.settings import QuantizeSettings", True),
        ("wan/x.py", "from ptq.checkpoint import shards\nimport torch", False),
    ],
)
def test_the_check_itself_finds_what_it_should(tmp_path: Path, path: str, source: str, bad: bool) -> None:
    file = tmp_path / "x.py"
    file.write_text(source)
    assert bool(violations(file, Path(path))) == bad
