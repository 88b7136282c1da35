"""Reports from artifacts: a self-contained HTML page, the technical report as PDF, and comparisons side by side.

Nothing here measures: every number comes from evaluation.json, units.jsonl or a checkpoint's manifest, and both outputs
read the same `Facts`. Heavy libraries (matplotlib, av, typst) are imported when a report is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptq.checkpoint.manifest import CARD_FILE
from ptq.report.locate import Sources, evaluation_directories

if TYPE_CHECKING:
    from ptq.report.facts import Facts

__all__ = ["Report", "Sources", "evaluation_directories", "render"]

DEFAULT_VIDEOS = 6
"""Pairs of videos that the page embeds."""


@dataclass(frozen=True)
class Report:
    """A report that was built: the verdict in one sentence, and the files; empty where one was not asked for."""

    verdict: str
    facts: Facts
    html: bytes = b""
    pdf: bytes = b""

    def write_card(self) -> Path | None:
        """Put the verdict into the checkpoint's model card.

        Returns:
            The card; None where the checkpoint was not found, or where somebody edited its card.

        Raises:
            PtqError: the checkpoint cannot be written to.
        """
        from ptq.wan.card import write_card

        checkpoint, manifest = self.facts.checkpoint, self.facts.manifest
        if checkpoint is None or manifest is None or not write_card(checkpoint, manifest, self.facts.evaluation):
            return None
        return checkpoint / CARD_FILE


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
    return Report(headline(facts), facts, page, document)
