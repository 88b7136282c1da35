"""One picture of several runs: a row of middle frames each, the same units above one another. For `ptq demo`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ptq.store.files import write_bytes

COLUMNS = 8
_FRAME_INCHES, _LABEL_INCHES, _DPI = 0.95, 1.75, 150


def write_picture(runs: Mapping[str, Path], out: Path) -> None:
    """Write a PNG with the middle frames of units at even distances in file order.

    Args:
        runs: label -> generation directory with saved frames; the first one's units are shown, which all others must have.
        out: the file.
    """
    names = sorted(path.name for path in (next(iter(runs.values())) / "frames").glob("*.npz"))
    shown = [names[i] for i in np.linspace(0, len(names) - 1, min(COLUMNS, len(names))).round().astype(int)]
    size = (_LABEL_INCHES + _FRAME_INCHES * len(shown), _FRAME_INCHES * len(runs))
    with rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        canvas = Figure(figsize=size)
        grid = canvas.add_gridspec(
            len(runs), len(shown), left=_LABEL_INCHES / size[0], right=1, bottom=0, top=1, wspace=0.04, hspace=0.04
        )
        for row, (label, run) in enumerate(runs.items()):
            for column, name in enumerate(shown):
                axes = canvas.add_subplot(grid[row, column])
                frames = np.load(run / "frames" / name)["frames"]
                axes.imshow(frames[len(frames) // 2])
                axes.set_axis_off()
            canvas.text(0.012, 1 - (row + 0.5) / len(runs), label, va="center", linespacing=1.4)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    write_bytes(out, buffer.getvalue())
