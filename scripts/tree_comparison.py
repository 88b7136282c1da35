"""What a command left in a folder, in a form in which two runs can be compared: names, modes, contents, JSON leaf by leaf."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Tree = dict[str, object]
"""Path, or path#key of a JSON file -> mode, digest or value."""
_TEMPORARY = re.compile(r"\..*\.part|\.ptq-.*|ptq-verify.*|.*\.claim|\..*\.lock|tmp.*")
_RESUMABLE = re.compile(r".*\.partial")
_TIMES = re.compile(r".*\.(seconds|peak_memory_bytes)")
"""Keys that may agree in two undisturbed runs by chance."""
_OF_A_RUN = "state"
"""Folder of locks, which nobody compares."""


def read_tree(root: Path) -> Tree:
    """Everything below a folder."""
    found: Tree = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if _OF_A_RUN in name.parts:
            continue
        found[f"{name} mode"] = oct(path.lstat().st_mode)
        if path.is_file():
            found |= {f"{name}{key}": value for key, value in _content(path)}
    return found


def differences(found: Tree, expected: Sequence[Tree]) -> list[str]:
    """Where a tree differs from what all the expected ones agree on."""
    first, *others = expected
    agreed = {
        name: value
        for name, value in first.items()
        if not _TIMES.fullmatch(name) and all(tree.get(name) == value for tree in others)
    }
    names = {name for tree in expected for name in tree}
    wrong = [
        f"{name}: {found.get(name)!s:.200} instead of {value!s:.200}"
        for name, value in agreed.items()
        if found.get(name) != value
    ]
    return wrong + [f"{name} should not be there" for name in found if name not in names]


def leftovers(*folders: Path, resumable: bool = False) -> list[str]:
    """Temporary files and folders below; `resumable`: but for unfinished directories that the next run continues."""
    names = [path for folder in folders for path in folder.rglob("*")]
    return [
        str(path)
        for path in names
        if _TEMPORARY.fullmatch(path.name) or (not resumable and _RESUMABLE.fullmatch(path.name))
    ]


def _content(path: Path) -> Iterator[tuple[str, object]]:
    data = path.read_bytes()
    if path.suffix == ".json":
        yield from _leaves("#", json.loads(data))
    elif path.suffix == ".jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        for number, line in enumerate(lines):  # the last line of a unit counts
            yield from _leaves(f"#{line.get('unit', number)}", line)
    else:
        yield "", hashlib.sha256(data).hexdigest()


def _leaves(key: str, value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(f"{key}[{index}]", inner)
    else:
        yield key, value
