"""The first difference of two directories: bytes, except the keys of a few JSON files that say when and with what."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MASKED: dict[str, tuple[str, ...]] = {
    "ptq_manifest.json": (
        "seconds",
        "blocks.seconds",
        "peak_memory_bytes",
        "versions",
        "package_version",
        "recipe",
        "signature",
    ),
    "run.json": ("versions", "digest"),
    "manifest-*.jsonl": ("seconds", "peak_memory_bytes", "finished", "device"),
    "evaluation.json": (
        "ptq_version",
        "reference.versions",
        "candidate.versions",
        "reference.run_digest",
        "candidate.run_digest",
    ),
    "units.jsonl": ("inputs",),
}
"""File name -> keys that may differ (list indices left out; a key stands for all below it). `units.jsonl: inputs` is a digest over
the files' times."""
RUNNING = ("state/*", "*.lock")
"""Files that only running processes need."""


def compare_directories(before: Path, after: Path) -> tuple[int, int, str | None]:
    """Number of files, number of those that are equal only but for masked keys, and what differs: tensors first."""
    names = [_files(before), _files(after)]
    for name in sorted(names[0] ^ names[1]):
        return 0, 0, f"{name} is only {'before' if name in names[0] else 'after'}"
    changed = [name for name in names[0] if (before / name).read_bytes() != (after / name).read_bytes()]
    differences = [
        f"{name}: {difference}"
        for name in sorted(changed, key=lambda name: (not name.endswith(".safetensors"), name))
        if (difference := _difference(before / name, after / name)) is not None
    ]
    masked = len(changed) - len(differences)
    if not differences:
        return len(names[0]), masked, None if names[0] else "no files"
    more = f" (and {len(differences) - 1} other files)" if len(differences) > 1 else ""
    return len(names[0]), masked, differences[0] + more


def _files(directory: Path) -> set[str]:
    names = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    return {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in RUNNING)}


def _difference(before: Path, after: Path) -> str | None:
    """The first difference of two files whose bytes differ; None where only masked keys do."""
    if before.suffix == ".safetensors":
        return _tensor_difference(before, after)
    if before.suffix not in (".json", ".jsonl"):
        return "other bytes"
    masks = next((keys for pattern, keys in MASKED.items() if fnmatch.fnmatch(before.name, pattern)), ())
    first, second = (
        {path: value for path, value in _leaves(_load(file)) if not _is_masked(path, masks)} for file in (before, after)
    )
    for path in dict.fromkeys([*first, *second]):
        a, b = (json.dumps(leaves[path]) if path in leaves else "nothing" for leaves in (first, second))
        if a != b:
            return f"{path} was {a}, is {b}"
    return None if masks else "the same values in other bytes"


def _load(path: Path) -> Any:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _is_masked(path: str, masks: Sequence[str]) -> bool:
    plain = ".".join(part for part in path.split(".") if not part.isdigit())
    return any(plain == mask or plain.startswith(mask + ".") for mask in masks)


def _tensor_difference(before: Path, after: Path) -> str:
    first, second = _read_tensors(before), _read_tensors(after)
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        if a is None or b is None:
            return f"{name} is only {'after' if a is None else 'before'}"
        if a != b:
            differing = sum(x != y for x, y in zip(a[1], b[1], strict=False))
            return f"{name} was {a[0]}, is {b[0]}, {differing} of {len(a[1])} bytes differ"
    return "the same tensors, another header or order"


def _read_tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Name -> (dtype and shape, bytes) of a safetensors file, read without the package or torch."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            f"{entry['dtype']} {entry['shape']}",
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }
