"""What several commands share: quiet libraries, shard options, printing JSON."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

from ptq.errors import UsageError


def quiet_libraries() -> None:
    """Silence progress bars and chatter of diffusers and transformers; the commands show their own progress."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|huggingface_hub)")


def parse_shard(text: str) -> tuple[int, int]:
    """ "i/N" -> (i, N), 0 <= i < N.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(f"--shard takes i/N with 0 <= i < N, for example 0/4; found {text!r}.")
    return int(match[1]), int(match[2])


def print_json(value: Any) -> None:
    """A result for machines, on stdout."""
    from ptq.ui import console

    console.print_json(json.dumps(value), indent=2) if console.is_terminal else console.out(
        json.dumps(value, indent=2, ensure_ascii=False), highlight=False
    )


def format_bytes(count: float) -> str:
    """Bytes as 3.1 GB, 12.0 MB or 4.0 KB (powers of ten)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{int(count)} B"
