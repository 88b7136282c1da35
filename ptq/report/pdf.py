"""The technical report as PDF, typeset by Typst with the fonts that its Python package carries.

System fonts are left out, so the same artifacts give the same bytes on any machine; the price is that scripts those fonts
lack (Chinese prompts) are named with their length and digest instead of printed. The page shows them in full.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import typst

from ptq import ui
from ptq.report.cells import Table
from ptq.report.facts import Facts
from ptq.report.figures import draw_figures
from ptq.report.html import all_tables, content, group_figures, is_numeric, read_template
from ptq.report.method import describe_method
from ptq.report.reproduce import reproduction
from ptq.report.videos import Clip
from ptq.store.files import scratch_directory

SHOWN_CLIPS = 4
_SMALL = 240
_FOREIGN = re.compile(r"[^\u0000-\u052f\u1e00-\u23ff]+(?:[\u0000-\u052f]{0,12}[^\u0000-\u052f\u1e00-\u23ff]+)*")
"""What the embedded fonts lack: all but Latin, Greek, Cyrillic, punctuation, arrows and operators."""


def build_pdf(facts: Facts, clips: list[Clip]) -> bytes:
    """The PDF. Of `clips`, the middle frames of the first SHOWN_CLIPS are shown."""
    with scratch_directory("ptq-report") as folder:
        (folder / "report.typ").write_text(read_template("report.typ"), encoding="utf-8")
        data = printable(report_data(facts, clips[:SHOWN_CLIPS], folder))
        (folder / "data.json").write_text(json.dumps(data, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        return typst.compile(str(folder / "report.typ"), root=str(folder), ignore_system_fonts=True, timestamp=0)


def report_data(facts: Facts, clips: list[Clip], folder: Path) -> dict[str, Any]:
    """Content of data.json; figures and frames are written into `folder`."""
    steps = reproduction(facts)
    figures = {}
    for group, drawn in group_figures(draw_figures(facts)).items():
        figures[group] = [{"file": f"{f.key}.svg", "title": f.title, "alt": f.alt} for f in drawn]
        for figure in drawn:
            (folder / f"{figure.key}.svg").write_bytes(figure.svg)
    gaps = " ".join(text for text in facts.omissions if text.startswith("The packed checkpoint"))
    return {
        **content(facts),
        "tables": {key: _table(table) for key, table in all_tables(facts).items()},
        "figures": figures,
        "method": [vars(step) for step in describe_method(facts.manifest)] if facts.manifest else [],
        "no_method": gaps,
        "clips": [_clip(index, clip, folder) for index, clip in enumerate(clips)],
        "no_clips": "The videos of both runs are not part of this report, so there are no frames to show.",
        "recipe": steps.recipe,
        "commands": steps.commands,
        "missing": steps.missing,
    }


def _table(table: Table) -> dict[str, Any]:
    numeric = [is_numeric(table, column) for column in range(len(table.columns))]
    words = [column for column in range(1, len(numeric)) if not numeric[column]]
    # The last column of words takes the free width; without one, the first column does.
    fill = words[-1] if words else 0
    return {
        "title": table.title,
        "columns": list(table.columns),
        "rows": table.texts,
        "note": table.note,
        "numeric": numeric,
        "widths": ["fill" if column == fill else "auto" for column in range(len(numeric))],
    }


def _clip(index: int, clip: Clip, folder: Path) -> dict[str, Any]:
    frames = []
    for movie in clip.movies:
        path = folder / f"frame-{index}-{movie.role}.jpg"
        path.write_bytes(movie.poster)
        frames.append(path.name)
    caption = f"{clip.prompt} ({clip.unit}{f', {clip.drift}' if clip.drift else ''})"
    return {"caption": caption, "frames": frames, "small": clip.width < _SMALL}


def printable(value: Any) -> Any:
    """The same data with text in scripts that the fonts lack replaced by its length and digest."""
    if isinstance(value, str):
        return _FOREIGN.sub(_named, ui.clean(value))
    if isinstance(value, dict):
        return {key: printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(item) for item in value]
    return value


def _named(match: re.Match[str]) -> str:
    digest = hashlib.sha256(match[0].encode()).hexdigest()[:12]
    return f"[{len(match[0])} characters that this font lacks, sha256 {digest}...; the page shows them]"
