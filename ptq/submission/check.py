"""One claim of a submission, the answer to it, and how the answer was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ptq.errors import PtqError

How = Literal["recomputed", "compared", "not checked"]
"""recomputed: made again by rules and code of this package. compared: two places that say the same. not checked: nobody
but the reader can."""
DAMAGE = (
    *(
        PtqError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
    ),
    *(AssertionError, ImportError),
)
"""What reading, loading and running somebody else's files may raise, in this package and in the libraries below it."""


class NotCheckedError(Exception):
    """A check that cannot be made from this archive; the text says why, and what to do instead."""


@dataclass(frozen=True)
class Claim:
    """name: what is claimed. holds: None where it was not checked. found: what was found, or why it does not hold."""

    name: str
    how: How
    holds: bool | None
    found: str

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return vars(self)


def decide(name: str, how: How, check: Callable[[], str]) -> Claim:
    """Run a check: it returns what it found, raises why the claim does not hold, or `NotCheckedError`."""
    try:
        return Claim(name, how, True, check())
    except NotCheckedError as error:
        return Claim(name, "not checked", None, str(error))
    except DAMAGE as error:
        return Claim(
            name, how, False, str(error) if isinstance(error, PtqError) else f"{type(error).__name__}: {error}"
        )


def not_checked(name: str, why: str) -> Claim:
    """A claim that this command never checks."""
    return Claim(name, "not checked", None, why)
