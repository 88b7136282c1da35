"""Help texts whose lines break between words only: `--out tiny-hif4` stays one word, so an example can be copied.

Lines are as long as the terminal, up to 120. A list of commands has their first sentences whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer.core

_HYPHEN = "\u2011"
"""No place to break a line: stands for "-" while lines are filled."""

_Context: type = typer.core.TyperCommand.context_class
_Base: type = _Context.formatter_class  # type: ignore[attr-defined]


class _Formatter(_Base):
    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _HYPHEN))

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        broad = col_max if self.width < 100 else col_max + 6  # `--records-per-prompt <int range>` beside its text
        super().write_dl([(first, second.replace("-", _HYPHEN)) for first, second in rows], broad, col_spacing)

    def getvalue(self) -> str:
        text: str = super().getvalue()
        return text.replace(_HYPHEN, "-")


class HelpContext(_Context):
    """The context of a command line with this help."""

    formatter_class = _Formatter


class _FirstSentence:
    """What the list of commands says of one."""

    help: str | None

    def get_short_help_str(self, limit: int = 45) -> str:
        first = (self.help or "").partition("\n\n")[0]
        return " ".join(first.split()).partition(". ")[0].rstrip(".") + "."


class Command(_FirstSentence, typer.core.TyperCommand):
    """One command."""

    context_class = HelpContext


class Group(_FirstSentence, typer.core.TyperGroup):
    """Several."""

    context_class = HelpContext
