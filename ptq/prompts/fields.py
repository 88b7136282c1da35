"""Checked access to the values of one entry of a prompt file: every complaint names the file, the entry and the key.

Not a schema language: four readers (text, optional text, path list, integers) are all the prompt formats need.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ptq import ui
from ptq.errors import DamagedFileError
from ptq.limits import PROMPT_CHARS
from ptq.prompts.container import UNPAIRED

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a prompt file. `name` is how messages call it; `value` is its JSON object (or line of text)."""

    file: Path
    name: str
    value: Any

    def get(self, key: str) -> Any:
        """The value under a dotted key (`metadata.path`), or None where any part is absent or null."""
        value = self._lookup(key)
        return None if value is _ABSENT else value

    def text(self, key: str) -> str:
        """A non-empty string without surrounding white space."""
        value = self._lookup(key)
        if not isinstance(value, str) or not value.strip():
            self.fail(key, "a non-empty string")
        return self._clean(key, value)

    def text_or_first(self, key: str) -> str:
        """A non-empty string, or the first element of a list of such strings."""
        value = self._lookup(key)
        if isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, str) or not value.strip():
            self.fail(key, "a non-empty string or a list that starts with one")
        return self._clean(key, value)

    def texts(self, key: str) -> list[str]:
        """A list of at least one non-empty string."""
        value = self._lookup(key)
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
            self.fail(key, "a list of one or more strings")
        return [self._clean(key, one) for one in value]

    def integers(self, key: str, count: int) -> tuple[int, ...]:
        """A list of exactly `count` integers that are not negative."""
        value = self._lookup(key)
        good = isinstance(value, list) and len(value) == count
        if not good or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value):
            self.fail(key, f"a list of {count} integers from 0 on")
        return tuple(value)

    def fail(self, key: str, expected: str) -> NoReturn:
        """Refuse this entry because of one key."""
        value = self._lookup(key)
        found = "nothing" if value is _ABSENT else ui.shorten(json.dumps(value, ensure_ascii=True, default=str))
        raise DamagedFileError(
            f"{self.file}, record {self.name}, key {key!r}: expected {expected}, found {found}. Correct or remove the record, or name another format with --prompt-format."
        )

    def _lookup(self, key: str) -> Any:
        value = self.value
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return _ABSENT
            value = value[part]
        return value

    def _clean(self, key: str, text: str) -> str:
        if UNPAIRED in text:
            self.fail(key, "text of whole characters (it has half of a surrogate pair)")
        if len(text) > PROMPT_CHARS:
            self.fail(key, f"at most {PROMPT_CHARS} characters")
        return text.strip()
