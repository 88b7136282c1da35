"""What several commands share: quiet libraries, shard and device of this process, printing JSON."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq import ui

if TYPE_CHECKING:
    from ptq.report.cells import Table
    from ptq.store.sharding import Shard


def quiet_libraries() -> None:
    """Silence progress bars and chatter of diffusers and transformers; the commands show their own progress."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|huggingface_hub)")


def resolve_shard(text: str | None, run: Path) -> Shard:
    """`--shard i/N`, or what the launcher says about the directory `run`; with several shards, say which this is."""
    from ptq.store.sharding import detect_shard, parse_shard

    shard = parse_shard(text) if text is not None else detect_shard(os.environ, run)
    if shard.count > 1:
        ui.info(f"Shard {shard.index}/{shard.count} (from {shard.source}).")
    return shard


def default_device() -> str:
    """The GPU of this process's local rank, or the CPU."""
    import torch

    from ptq.store.sharding import local_rank

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{local_rank(os.environ) % torch.cuda.device_count()}"


def describe_out(out: Path, work: Path, *, fresh: bool) -> str:
    """--out for a plan, and what happens to that which is there already in `work`, the directory that is continued."""
    fate = "it is deleted and made anew" if fresh else "what is finished in it is kept"
    return f"{out} ({work} is there already; {fate})" if work.exists() else f"{out}"


def print_json(value: Any) -> None:
    """A result for machines, on stdout; in colours on a terminal, in ASCII where stdout has no UTF-8."""
    text = ui.clean_json(json.dumps(value, indent=2, ensure_ascii=not ui.console.encoding.startswith("utf")))
    if ui.console.is_terminal:
        from rich.highlighter import JSONHighlighter

        ui.console.print(JSONHighlighter()(text), soft_wrap=True)
    else:
        ui.console.out(text, highlight=False)


def show_tables(tables: Iterable[Table]) -> None:
    """Tables of a report on the terminal, each with its note."""
    for table in tables:
        ui.table(table.title, table.columns, table.texts)
        if table.note:
            ui.info(table.note)
