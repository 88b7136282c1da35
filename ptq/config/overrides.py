"""`--set key=value`: single keys of a recipe changed, as nested values before they are validated."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ptq.config.load import parse_yaml
from ptq.errors import UsageError, shown

SWITCHED = ("solver.tune",)
"""Groups of keys that true and false stand for, too."""


def apply_override(value: dict[str, Any], override: str, groups: Collection[str]) -> None:
    """Set one key; a key of one of `SWITCHED` switches its group on.

    Args:
        value: a recipe's keys in their groups; changed.
        override: "key=value" or "group.key=value"; values are YAML.
        groups: the recipe's own, which are never set whole.

    Raises:
        UsageError: no key=value, no YAML, a whole group, or a key below something that is no group.
    """
    written, separator, text = override.partition("=")
    if not separator:
        raise UsageError(f"--set takes key=value, found {shown(override)}.")
    key = key_of(override)
    if key in groups:
        raise UsageError(
            f"--set {key} would replace a whole group, and drop what the recipe has in it. Set its keys one by one, as --set {key}.KEY=VALUE."
        )
    *above, last = key.split(".")
    for depth, group in enumerate(above, 1):
        if ".".join(above[:depth]) in SWITCHED and not isinstance(value.get(group), dict):
            value[group] = {}
        value = value.setdefault(group, {})
        if not isinstance(value, dict):
            raise UsageError(f"--set {written}: {group[:80]} is not a group of keys.")
    try:
        value[last] = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"--set {written}: the value {shown(text)} is not valid YAML: {error}.") from error


def refuse_undone(overrides: Sequence[str]) -> None:
    """A whole group that is set after one of its keys would take that key back.

    Raises:
        UsageError: names both.
    """
    keys = [key_of(override) for override in overrides]
    for position, key in enumerate(keys):
        for earlier in keys[:position]:
            if earlier.startswith(f"{key}."):
                raise UsageError(
                    f"--set {overrides[position]} would undo --set {earlier}, which stands before it. Leave one of them out."
                )


def key_of(override: str) -> str:
    """The key that an override sets, with its groups."""
    return override.partition("=")[0].strip()


def name_with(name: str, overrides: Sequence[str]) -> str:
    """A recipe's name for people, with the keys that `--set` gave other values: it is not all that its own file says of it."""
    keys = dict.fromkeys(map(key_of, overrides))
    return f"{name} (changed: {', '.join(keys)})" if keys else name
