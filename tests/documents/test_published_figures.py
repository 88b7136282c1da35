"""The tables of docs/ say what docs/data holds: every published row is formatted again from its file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
TITLES = {"hif4": "HiF4", "mxfp4": "MXFP4", "hif4-fast": "`hif4-fast`"}
RECIPES = list(TITLES)


def data(name: str) -> Any:
    return json.loads((DOCS / f"data/{name}.json").read_text())


def ratios(rows: list[dict[str, Any]], key: str = "ratio", /, **where: object) -> list[float]:
    return [row[key] for row in rows if all(row[name] == value for name, value in where.items())]


def spread(values: list[float]) -> str:
    """Mean [least, most]."""
    return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def decibels(after: float, before: float) -> str:
    return f"{10 * math.log10(before / after):+.2f} dB"


def percent(loss: dict[str, float]) -> str:
    value, low, high = (f"{100 * loss[key]:+.2f} %" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def every_variant() -> Iterator[str]:
    for name in ("hif4", "mxfp4"):
        for row in data(f"quality-tiny-{name}"):
            yield f"| {row['variant']} | {row['error']:.2e} | {row['ratio']:.3f} | {row['gain_db']:+.2f} dB |"


def costs() -> Iterator[str]:
    rows = data("costs-tiny")
    for row in rows:
        (base,) = ratios(rows, "error", format=row["format"], variant="rtn")
        ratio = "1" if row["variant"] == "rtn" else f"{row['error'] / base:.3f}"
        yield f"| {ratio} | {row['bits']:.2f} | {row['seconds_a_block']:.2f} s | {row['video']:.2f}x |"


def block_sizes() -> Iterator[str]:
    for model in ("tiny", "tiny-outliers"):
        digits = 3 if model == "tiny" else 4
        for recipe in RECIPES:
            rows = {row["block"]: row for row in data(f"block-sizes-{model}") if row["recipe"] == recipe}
            cells = [
                f"{row['mean']:.{digits}f} [{row['least']:.{digits}f}, {row['most']:.{digits}f}]".replace("0.", ".")
                for row in (rows[64], rows[128])
            ]
            yield f"| {cells[0]} | {cells[1]}, {100 * (rows[128]['mean'] / rows[64]['mean'] - 1):+.1f} % |"


def encoder() -> Iterator[str]:
    for row in data("encoder"):
        cell = f"{row['mean']:.2f}"
        yield f"| {cell} |" if row["block"] == 0 else f"| {cell} [{row['least']:.2f}, {row['most']:.2f}] |"


def prompts() -> Iterator[str]:
    rows = data("prompts-tiny")["draws"]
    for count in (8, 16, 24, 36, 48, 72):
        found = [ratios(rows, format=name, records_per_prompt=8, prompts=count) for name in ("hif4", "mxfp4")]
        cells = " | ".join(f"{fmean(one):.3f} ({min(one):.3f} to {max(one):.3f})" for one in found)
        yield f"| {count} | {cells} |"


def residual() -> Iterator[str]:
    rows = data("residual-tiny")
    for recipe, title in TITLES.items():
        found = [ratios(rows, recipe=recipe, blocks=blocks) for blocks in ("none", "residual 0.05", "residual 0.1")]
        without = fmean(found[0])
        gained = " | ".join(f"{spread(one)}, {decibels(fmean(one), without)}" for one in found[1:])
        yield f"| {title} | {spread(found[0])} | {gained} |"


def tuning() -> Iterator[str]:
    rows = data("tuning-tiny")
    for recipe, title in TITLES.items():
        cells = []
        for blocks in ("none", "0.05"):
            solved, tuned = (ratios(rows, recipe=recipe, residual=blocks, tune=tune) for tune in ("false", "true"))
            less = fmean(tuned) / fmean(solved)
            cells += [spread(solved), f"{spread(tuned)}, {100 * (less - 1):+.1f} %, {decibels(less, 1.0)}"]
        yield f"| {title} | {' | '.join(cells)} |"


def tuned_gate() -> Iterator[str]:
    for row in data("tuned-gate")[1:]:
        error = f"{row['denoiser_error']:.2e}".replace("e-0", "e-")
        yield f"| {error} | {row['psnr']:.1f} dB | {percent(row['loss'])}, {row['verdict']} |"


def sensitivity() -> Iterator[str]:
    for row in data("tiny-table")[1:]:
        scores = " | ".join(f"{row[name]:.3f}" for name in ("colour", "shape", "direction"))
        loss = percent(row["loss"]).replace(" %", "%")
        cells = f"{row['denoiser_error']:.2e} | {scores} | {row['psnr']:.1f} dB | {loss} | {row['verdict']}"
        yield f"| {row['model']} | {row['format']} | {row['recipe']} | {cells} |"


def protection() -> Iterator[str]:
    found = [data(f"protection-tiny-{name}")["held_out_error"] for name in ("hif4", "mxfp4")]
    names = {"none": "none", "auto": "chosen", "first blocks": "first blocks"}
    names |= {"first and last blocks": "first and last blocks", "random (mean of 16)": "random, mean of 16 draws"}
    for key, name in names.items():
        yield f"| {name} | {found[0][key]:.2e} | {found[1][key]:.2e} |"


def behind() -> Iterator[str]:
    for row in data("behind"):
        if "loss" in row["default"]:
            losses = [row["default"]["loss"], row["behind"]["loss"], row["loss_against_default"]]
            gain = [f"{row['psnr_gain'][key]:+.2f}" for key in ("value", "low", "high")]
            cells = f"{' | '.join(map(percent, losses))} | {gain[0]} dB [{gain[1]}, {gain[2]}]"
            yield f"| {TITLES[row['format']]} | {cells} |"


TABLES = {every_variant: "quality", costs: "quality", block_sizes: "quality", encoder: "quality", prompts: "quality"}
TABLES |= {residual: "quality", tuning: "quality", tuned_gate: "quality", protection: "quality"}
TABLES |= {sensitivity: "tiny", behind: "log"}


@pytest.mark.parametrize("rows", TABLES, ids=lambda rows: rows.__name__)
def test_a_published_table_is_that_of_its_data(rows: Any) -> None:
    text = (DOCS / f"{TABLES[rows]}.md").read_text(encoding="utf-8").replace("**", "")
    missing = [row for row in rows() if row not in text]
    assert not missing
