"""Constants and the layout of the job that the report tests read; the runs' writer is that of the evaluation tests."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))
from evaluation_runs import make_run, tiny_clips

from ptq.report import Sources, render

__all__ = ["SENSITIVITY", "SETTINGS", "UNITS", "Job", "make_run", "page_of", "pdf_of", "tiny_clips"]

UNITS = 24
SENSITIVITY = {
    "metric": "squared denoiser-output error",
    "quantize_one": [
        {"expert": expert, "block": block, "error": 1e-4 * (1 + block + 10 * number)}
        for number, expert in enumerate(("transformer", "transformer_2"))
        for block in range(2)
    ],
    "picks": [{"expert": "transformer_2", "block": 1, "before": 3e-3, "after": 2e-3}],
    "comparison": {"none": 3e-3, "auto": 2e-3, "first blocks": 2.5e-3},
}
SETTINGS = {
    "height": 64, "width": 64, "num_frames": 9, "fps": 8, "steps": 4, "flow_shift": 3.0, "guidance_scale": 4.0,
    "guidance_scale_2": 3.0, "negative_prompt": "模糊，低质量", "max_sequence_length": 64, "seed": 0, "dtype": "float32",
    "image_to_video": False, "save_frames": False, "attention_backend": None,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Directories of a finished job in the layout of `ptq demo`."""

    root: Path

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation" / "hif4"

    @property
    def checkpoint(self) -> Path:
        return self.root / "hif4"

    def run(self, role: str) -> Path:
        return self.root / "videos" / {"reference": "original", "candidate": "hif4"}[role]

    def content(self) -> dict:
        return json.loads((self.evaluation / "evaluation.json").read_text())

    def edit(self, change) -> None:
        """Rewrite evaluation.json with `change` applied."""
        content = self.content()
        change(content)
        (self.evaluation / "evaluation.json").write_text(json.dumps(content))


def page_of(evaluation: Path, checkpoint: Path | None = None) -> str:
    """The page of a report."""
    return render(Sources(evaluation, checkpoint), pdf=False).html.decode()


def pdf_of(evaluation: Path, checkpoint: Path | None = None) -> bytes:
    """The PDF of a report."""
    return render(Sources(evaluation, checkpoint), html=False).pdf
