"""Reports from artifacts: a self-contained HTML page, the technical report as PDF, and comparisons side by side.

Nothing here measures: every number comes from evaluation.json, units.jsonl or a checkpoint's manifest, and both outputs
read the same `Facts`. Heavy libraries (matplotlib, av, typst) are imported when a report is built.
"""

from __future__ import annotations

from pathlib import Path

from ptq.report.locate import Sources, evaluation_directories

__all__ = ["Sources", "evaluation_directories", "render", "render_html", "render_pdf"]

DEFAULT_VIDEOS = 6


def render(
    sources: Sources, *, html: bool = True, pdf: bool = True, videos: int = DEFAULT_VIDEOS
) -> tuple[str, bytes | None, bytes | None]:
    """Build the wanted outputs from one reading of the artifacts.

    Args:
        sources: where the artifacts are.
        videos: how many pairs of videos the page embeds, 0 for none.

    Returns:
        The verdict in one sentence, the page (or None), the PDF (or None).

    Raises:
        PtqError: as `facts.gather` and `videos.make_clips`.
    """
    from ptq.report.facts import gather
    from ptq.report.videos import make_clips
    from ptq.report.wording import headline

    facts = gather(sources)
    clips = make_clips(facts, videos)
    page = document = None
    if html:
        from ptq.report.html import build_html

        page = build_html(facts, clips)
    if pdf:
        from ptq.report.pdf import build_pdf

        document = build_pdf(facts, clips)
    return headline(facts), page, document


def render_html(evaluation: Path, checkpoint: Path | None = None, *, videos: int = DEFAULT_VIDEOS) -> bytes:
    """The page of an evaluation directory. Deterministic: the same artifacts give the same bytes."""
    page = render(Sources(evaluation, checkpoint), pdf=False, videos=videos)[1]
    assert page is not None
    return page


def render_pdf(evaluation: Path, checkpoint: Path | None = None) -> bytes:
    """The technical report of an evaluation directory. Deterministic as `render_html`."""
    document = render(Sources(evaluation, checkpoint), html=False)[2]
    assert document is not None
    return document
