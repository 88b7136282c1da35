"""Figures as SVG with text as outlines: the same bytes on the page and in the PDF, whatever fonts a machine has.

Colours: cividis and blue/orange, which stay distinct with every common colour vision deficiency and in grey print.
Every figure has a table with its numbers beside it or an alternative text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from ptq.evaluation.statistics import AGGREGATES
from ptq.report.facts import Facts
from ptq.store.evaluation import Estimate, Evaluation
from ptq.store.sensitivity import SensitivityTable

BLUE, ORANGE, GREY = "#1f4e79", "#c55a11", "#8a8a8a"
WIDTH = 7.2


@dataclass(frozen=True)
class Figure:
    """A drawn figure; `alt` says in words what it shows; `wide`: small screens scroll it instead of shrinking it."""

    key: str
    title: str
    svg: bytes
    alt: str
    wide: bool = False


def draw_figures(facts: Facts) -> list[Figure]:
    """Every figure that these facts allow, in reading order."""
    figures = []
    if facts.evaluation.verdict is not None:
        figures.append(_loss(facts.evaluation))
    if facts.manifest is not None:
        for expert in dict.fromkeys(row.expert for row in facts.manifest.blocks):
            figures += _heatmaps(facts, expert)
    if facts.sensitivity is not None:
        figures.append(_sensitivity(facts.sensitivity))
    return figures


def _svg(key: str, height: float, draw: Callable[[Canvas], None]) -> bytes:
    style: Any = {
        "svg.hashsalt": key,
        "svg.fonttype": "path",
        "font.size": 9,
        "font.family": "DejaVu Sans",
        "axes.linewidth": 0.6,
    }
    with rc_context(style):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        draw(canvas)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _loss(evaluation: Evaluation) -> Figure:
    rows: list[tuple[str, Estimate]] = [
        (name.replace("_", " "), d.relative_loss) for name, d in evaluation.dimensions.items() if d.relative_loss
    ]
    if evaluation.deciding is not None and evaluation.gate is not None:
        rows.append((AGGREGATES[evaluation.gate], evaluation.deciding))
    limit = 100 * (evaluation.limit or 0.0)
    beside = evaluation.yardstick
    others = {name.replace("_", " "): d.relative_loss for name, d in beside.dimensions.items()} if beside else {}
    if beside and evaluation.gate in beside.aggregates:
        others[AGGREGATES[evaluation.gate]] = beside.aggregates[evaluation.gate]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.axvline(limit, color=ORANGE, linewidth=1.4, linestyle="--")
        for y, (name, loss) in enumerate(reversed(rows)):
            decides = name == AGGREGATES.get(evaluation.gate or "")
            if loss.low is not None and loss.high is not None:
                axes.plot([100 * loss.low, 100 * loss.high], [y, y], color=BLUE, linewidth=5 if decides else 2)
            axes.plot(
                [100 * loss.value], [y], marker="D" if decides else "o", color=BLUE, markersize=8 if decides else 6
            )
        for y, (name, _) in enumerate(reversed(rows)):
            other = others.get(name)
            if other is not None:
                if other.low is not None and other.high is not None:
                    axes.plot([100 * other.low, 100 * other.high], [y - 0.25] * 2, color=GREY, linewidth=1.5)
                axes.plot([100 * other.value], [y - 0.25], marker="s", color=GREY, markersize=4)
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(
            f"loss in percent (dashed: the limit, {limit:g} %{'; grey squares: the yardstick' if others else ''})"
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)

    alt = f"Loss of each dimension with its interval, and the deciding average, against the limit of {limit:g} percent."
    alt += " In grey below: the yardstick." if others else ""
    return Figure("loss", "Loss by dimension with 95 % intervals", _svg("loss", 0.9 + 0.34 * len(rows), draw), alt)


def _decibel(error: float | None) -> float:
    """NaN (drawn as a gap) where there is no error or no figure: a zero would swallow the colour scale."""
    return 10 * math.log10(error) if error else math.nan


def _heatmaps(facts: Facts, expert: str) -> list[Figure]:
    """Layer errors and block errors of one expert and, where the recipe is more than rounding, the gain over rounding."""
    assert facts.manifest is not None
    blocks = [row for row in facts.manifest.blocks if row.expert == expert]
    layers = [row for row in facts.manifest.layers if row.expert == expert]
    names = list(dict.fromkeys(row.layer for row in layers))
    column = {row.block: i for i, row in enumerate(blocks)}
    error, gain = np.full((2, len(names), len(blocks)), math.nan)
    for row in layers:
        cell = names.index(row.layer), column[row.block]
        error[cell] = _decibel(row.output_error)
        gain[cell] = _decibel(row.output_error_rtn) - error[cell]
    stream = np.array([[_decibel(row.stream_error) for row in blocks]])
    indices = [row.block for row in blocks]
    drawn = _svg(f"heat-{expert}", 4.0, lambda canvas: _draw_heat(canvas, error, stream, names, indices))
    protected = [str(row.block) for row in blocks if row.high_precision]
    words = f" Hatched: high precision (blocks {', '.join(protected)})." if protected else ""
    mark = "; hatched: high precision" if protected else ""
    figures = []
    if names:
        alt = f"{expert}: relative output error of each layer and, below, of the hidden states after each block.{words}"
        figures.append(
            Figure(
                f"heat-{expert}",
                f"{expert}: error of each layer and block (dB, lower is better{mark})",
                drawn,
                alt,
                True,
            )
        )
    if np.nanmax(np.abs(gain), initial=0.0) > 0.005:
        svg = _svg(f"gain-{expert}", 3.2, lambda canvas: _draw_gain(canvas, gain, names, indices))
        alt = f"{expert}: how many dB lower each layer's error is than with plain rounding in the same basis.{words}"
        figures.append(
            Figure(f"gain-{expert}", f"{expert}: gain over plain rounding (dB, higher is better{mark})", svg, alt, True)
        )
    return figures


def _cells(axes: Any, values: np.ndarray, names: list[str], blocks: list[int], **style: Any) -> Any:
    axes.set_facecolor("#ffffff")
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("#bbbbbb")
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), edgecolors="white", linewidth=0.4, **style)
    every = max(1, math.ceil(len(blocks) / 20))
    shown = range(0, len(blocks), every)
    axes.set_xticks([i + 0.5 for i in shown], [str(blocks[i]) for i in shown])
    axes.set_yticks([i + 0.5 for i in range(len(names))], names)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    return mesh


def _draw_heat(canvas: Canvas, error: np.ndarray, stream: np.ndarray, names: list[str], blocks: list[int]) -> None:
    top, bottom = canvas.subplots(2, 1, height_ratios=[max(len(names), 1), 2.0])
    mesh = _cells(top, error, names, blocks, cmap="cividis")
    canvas.colorbar(mesh, ax=top, label="layer output error, dB", pad=0.01)
    mesh = _cells(bottom, stream, ["hidden states"], blocks, cmap="cividis")
    canvas.colorbar(mesh, ax=bottom, label="dB", pad=0.01, ticks=MaxNLocator(2))
    bottom.set_xlabel("block")


def _draw_gain(canvas: Canvas, gain: np.ndarray, names: list[str], blocks: list[int]) -> None:
    axes = canvas.subplots()
    most = float(np.nanmax(np.abs(gain)))
    mesh = _cells(axes, gain, names, blocks, cmap="PuOr", vmin=-most, vmax=most)
    canvas.colorbar(mesh, ax=axes, label="dB better than rounding", pad=0.01)
    axes.set_xlabel("block")


def _sensitivity(sensitivity: SensitivityTable) -> Figure:
    one = sensitivity.quantize_one
    picked = {(pick.expert, pick.block) for pick in sensitivity.picks}
    experts = list(dict.fromkeys(row.expert for row in one))

    def draw(canvas: Canvas) -> None:
        rows = np.atleast_1d(canvas.subplots(len(experts), 1, sharey=True))
        for axes, expert in zip(rows, experts, strict=True):
            for chosen, marker, colour in ((False, "o", BLUE), (True, "D", ORANGE)):
                points = [row for row in one if row.expert == expert and ((expert, row.block) in picked) == chosen]
                axes.plot([p.block for p in points], [p.error for p in points], marker, color=colour)
            axes.set_yscale("log")
            axes.set_title(expert, loc="left", fontsize=9)
            axes.set_ylabel("denoiser error")
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
            axes.spines[["top", "right"]].set_visible(False)
        rows[-1].set_xlabel("block quantized alone (diamonds: chosen for high precision)")

    worst = max(one, key=lambda row: row.error)
    name = f"{worst.expert}:{worst.block}"
    alt = f"Denoiser error with one block quantized at a time; the most sensitive block is {name}."
    svg = _svg("sensitivity", 0.6 + 1.7 * len(experts), draw)
    return Figure("sensitivity", "Sensitivity: error with one block quantized", svg, alt, True)
