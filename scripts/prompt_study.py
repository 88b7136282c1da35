"""How many prompts, and how many records of each, calibration needs: the table and the picture of docs/quality.md.

    python scripts/prompt_study.py --work build/prompt-study

Records every denoiser call of a pool of prompts once. A draw of N prompts with R records each is N neighbours of the pool with
the calls that `ptq calibrate --num-prompts N --records-per-prompt R` chooses; the first draw is byte for byte what that command
records from the pool's file, later draws are other prompts. Each draw is solved for every format (scripts/held_out.py) and
judged on held-out records, relative to plain rounding. Draws of one count share no prompt. Finished rows are kept: the same
command goes on where it stopped, first draws first, so that it can be stopped when there are enough.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation import record
from held_out import sweep

from ptq.calibration.schedule import choose_steps
from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.quantization.settings import QuantizeSettings
from ptq.store.calibration import CalibrationSet
from ptq.store.files import read_json, write_json
from ptq.store.records import BRANCHES, prompt_file
from ptq.tiny.grammar import calibration_prompts, held_out_prompts
from ptq.wan.loading import resolve_model

FORMATS = ("hif4", "mxfp4")
HELD_OUT = 16, 8
"""Held-out prompts, and records of each: those of the other tables."""
GRID = {8: (8, 16, 24, 36, 48, 72, 144), 4: (48, 72), 2: (48, 96, 144)}
"""Records of each prompt -> numbers of prompts: 192 and 288 records also from two and four times the prompts. With guidance two
records, both branches of one step, are the fewest that a prompt has."""


def draw(pool: CalibrationSet, start: int, prompts: int, records_per_prompt: int) -> CalibrationSet:
    """The records that calibration with `prompts` of the pool's prompts, from `start` on, would have kept.

    Args:
        pool: with guidance, and every call of each prompt recorded.
    """
    steps = max(1, records_per_prompt // len(BRANCHES))
    kept = {
        (str(prompt_file(pool.directory, start + index).relative_to(pool.directory)), step.index)
        for index in range(prompts)
        for step in choose_steps(pool.info.schedule, steps, index)
    }
    drawn = copy.copy(pool)
    drawn.records = [record for record in pool.records if (record.file, record.step) in kept]
    return drawn


def settings_of(recipe: str | None) -> dict[str, QuantizeSettings]:
    """Format -> settings with this recipe; None: the format's default."""
    return {
        name: QuantizeSettings(name, load_recipe(recipe or name, name), recipe or name, {}, seed=0) for name in FORMATS
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each format, number of prompts and records: mean, smallest and largest ratio of its draws."""

    def key(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["format"], row["records_per_prompt"], row["prompts"]

    lines = []
    for (name, records, prompts), found in itertools.groupby(sorted(rows, key=key), key=key):
        ratios = [row["ratio"] for row in found]
        spread = {"mean": statistics.fmean(ratios), "least": min(ratios), "most": max(ratios)}
        lines.append({"format": name, "records_per_prompt": records, "prompts": prompts, "draws": len(ratios)} | spread)
    return lines


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Error relative to rtn over the number of prompts, a line for each number of records; every draw a point."""
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, len(FORMATS), figsize=(9, 3.4))
    for axes, name in zip(both, FORMATS, strict=True):
        own = [row for row in rows if row["format"] == name]
        lines = [line for line in summary(rows) if line["format"] == name]
        for colour, records in enumerate(sorted({line["records_per_prompt"] for line in lines})):
            points = [row for row in own if row["records_per_prompt"] == records]
            means = [line for line in lines if line["records_per_prompt"] == records]
            axes.plot([x["prompts"] for x in points], [x["ratio"] for x in points], ".", color=f"C{colour}", alpha=0.4)
            label = f"{records} records a prompt"
            axes.plot([x["prompts"] for x in means], [x["mean"] for x in means], color=f"C{colour}", label=label)
        axes.set_xscale("log")
        ticks = sorted({line["prompts"] for line in lines})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("calibration prompts")
        axes.set_title(name)
    both[0].set_ylabel("held-out error relative to rtn")
    both[-1].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("build/prompt-study"))
    parser.add_argument("--out", type=Path, default=Path("docs/data"))
    parser.add_argument("--figures", type=Path, default=Path("docs/img"))
    parser.add_argument("--pool", type=int, default=144, help="prompts that are recorded")
    parser.add_argument("--draws", type=int, default=4, help="of each number of prompts, at most")
    args = parser.parse_args()
    quiet_libraries()
    pairs = [(records, prompts) for records, counts in GRID.items() for prompts in counts]
    layout = resolve_model(args.model)
    calls = layout.preset.steps * len(BRANCHES)
    pool = record(args.model, layout, args.work, "pool", calibration_prompts(args.pool), calls)
    other = record(args.model, layout, args.work, "held-out", held_out_prompts(HELD_OUT[0]), HELD_OUT[1])
    table = args.out / f"prompts-{args.model}.json"
    recipes = {name: one.recipe.model_dump(mode="json") for name, one in settings_of(None).items()}
    done = read_json(table) if table.exists() else {}
    if done.get("recipes") != recipes:  # of other defaults
        plain = sweep(layout, draw(pool, 0, 1, calls), other, settings_of("rtn"))
        done = {"recipes": recipes, "rtn": {row.name: row.error for row in plain}, "draws": []}
    for index, (records, prompts) in itertools.product(range(args.draws), pairs):
        start = index * prompts
        made = {(row["draw"], row["records_per_prompt"], row["prompts"]) for row in done["draws"]}
        if start + prompts > args.pool or (index, records, prompts) in made:
            continue
        for row in sweep(layout, draw(pool, start, prompts, records), other, settings_of(None)):
            what = {"format": row.name, "prompts": prompts, "records_per_prompt": records, "draw": index}
            done["draws"].append(what | {"error": row.error, "ratio": row.error / done["rtn"][row.name]})
            print(done["draws"][-1], flush=True)
        write_json(table, done)
    for line in summary(done["draws"]):
        print(line)
    plot(done["draws"], args.figures / f"prompts-{args.model}.png")


if __name__ == "__main__":
    main()
