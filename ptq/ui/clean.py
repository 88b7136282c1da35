"""Texts of others made harmless: what they hold must be seen, never obeyed, by terminal, page and reader."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 but for tab and newline, DEL, C1, marks that turn the direction of writing, line separators, half surrogates."""
LONGEST = 2400
"""Characters of a message; more does not help anybody."""


def clean(text: str) -> str:
    """Control characters as they are written in source code (`\\x1b`, `\\u202e`); all else as it is."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def clean_json(text: str) -> str:
    """JSON text whose strings hold no control character in the raw; the same value."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def clean_message(text: str) -> str:
    """As `clean`, and no longer than `LONGEST`: the start and the end, where a message says what to do."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half} characters left out) ... {text[-half:]}"
    return clean(text)
