"""`ptq prompts FILE`: what a prompt file was recognised as, what it holds, which pictures are missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json

if TYPE_CHECKING:
    from ptq.prompts import Survey

PROMPT_CHARS = 70
ID_CHARS = 40
_KINDS = {"image": "a picture", "video": "a frame of a clip", "crop": "a crop of a frame of a clip"}


def prompts(
    file: Annotated[Path, typer.Argument(help="Prompt file: .json, .jsonl or .txt.", show_default=False)],
    media_root: options.MediaRoot = None,
    prompt_format: options.PromptFormat = None,
    exclude: options.Exclude = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Read the first N prompts only.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show what a prompt file holds: format, counts, caption lengths, missing pictures, a preview.

    Example: ptq prompts OpenS2V-5M_to_mm.json --media-root /data/OpenS2V-5M
    """
    from ptq.prompts import PromptScan, survey

    scan = PromptScan(file, prompt_format=prompt_format, limit=limit, exclude=exclude, media_root=media_root or ())
    result = survey(scan)
    if as_json:
        print_json(result.as_json())
        return
    ui.details(f"{file}", dict(_facts(result)))
    _show_preview(result)
    if result.missing:
        first = ", ".join(f"{one['id']} ({one['path']})" for one in result.missing_first)
        ui.warn(
            f"{result.missing} of {result.samples} samples have no picture or clip here. First: {first}. Name the folder that holds them with --media-root; image-to-video runs need them."
        )


def _facts(result: Survey) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [
        ("format", result.format),
        ("dataset (first part of every unit)", result.dataset),
        ("records in the file", result.records),
        ("prompts", result.samples),
        ("left out by --exclude", result.excluded),
    ]
    if result.caption_chars is not None:
        spread = result.caption_chars
        facts.append(
            ("caption length, characters", f"{spread['min']} min, {spread['median']:g} median, {spread['max']} max")
        )
    kinds = {kind: count for kind, count in result.media.items() if kind != "none"}
    if kinds:
        facts += [(f"start from {_KINDS[kind]}", count) for kind, count in kinds.items()]
        facts += [("found here", sum(kinds.values()) - result.missing), ("missing", result.missing)]
        facts.append(("resize policy", result.resize_policy))
    return [*facts, ("sha256, first 16 digits", result.sha256[:16])]


def _show_preview(result: Survey) -> None:
    rows = []
    for one in result.preview:
        picture = "-" if one["media"] is None else "missing" if one["resolved"] is None else "found"
        name, prompt = (" ".join(one[key].split()) for key in ("id", "prompt"))
        rows.append((ui.shorten(name, ID_CHARS), picture, ui.shorten(prompt, PROMPT_CHARS)))
    ui.table(f"First {len(rows)} prompts", ("id", "picture", "prompt"), rows, numbers=False)
