"""Reports from artifacts: a self-contained HTML page, the technical report as PDF, and comparisons side by side.

Nothing here measures: every number comes from evaluation.json, units.jsonl or a checkpoint's manifest, and both outputs
read the same `Facts`. Heavy libraries (matplotlib, av, typst) are imported when a report is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptq.report.locate import Sources, evaluation_directories

__all__ = ["Report", "Sources", "evaluation_directories", "render"]

DEFAULT_VIDEOS = 6
"""Pairs of videos that the page embeds."""


@dataclass(frozen=True)
class Report:
    """A report that was built: the verdict in one sentence, and the files; empty where one was not asked for."""

    verdict: str
    html: bytes = b""
    pdf: bytes = b""


def render(sources: Sources, *, html: bool = True, pdf: bool = True, videos: int = DEFAULT_VIDEOS) -> Report:
    """Build the wanted outputs from one reading of the artifacts; the same artifacts give the same bytes.

    Args:
        sources: where the artifacts are.
        videos: how many pairs of videos the page embeds, 0 for none.

    Raises:
        PtqError: as `facts.gather` and `videos.make_clips`.
    """
    from ptq.report.facts import gather
    from ptq.report.videos import make_clips
    from ptq.report.wording import headline

    facts = gather(sources)
    clips = make_clips(facts, videos)
    page = document = b""
    if html:
        from ptq.report.html import build_html

        page = build_html(facts, clips)
    if pdf:
        from ptq.report.pdf import build_pdf

        document = build_pdf(facts, clips)
    return Report(headline(facts), page, document)
