"""What each part of the default recipes costs, and what it gains; for docs/quality.md.

    python scripts/cost_table.py --model tiny --work build/costs --out docs/data

Of each format's default recipe and the default with one key changed: held-out denoiser error, bits a weight with its basis, processor
time to quantize a block, and processor time of a video against the original's. Videos of all checkpoints and the original take
turns in one process; a ratio is the median over the turns. One thread; on a machine with other work read the ratios. As making
checkpoints is timed, --work must hold none of an earlier run. Writes <out>/costs-<model>.json and prints the table.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from ablation import PLAIN, record_both, sweep_parser
from held_out import denoiser_errors

from ptq import ui
from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.quantization.job import Job
from ptq.quantization.run import quantize
from ptq.quantization.settings import QuantizeSettings
from ptq.store.calibration import CalibrationSet
from ptq.store.files import write_json
from ptq.tiny.grammar import held_out_prompts
from ptq.wan.layout import ModelLayout
from ptq.wan.loading import load_pipeline, resolve_model
from ptq.wan.pipeline import call_arguments

VARIANTS = {
    "default": (),
    "blocks of 64": ("scheme.block=64",),
    "no change of basis": ("scheme.transform=none",),
    "plain input scales": ("scheme.input_rule=null",),
    "no GPTQ": ("solver.rounding=rtn",),
    "no clipping search": ("solver.clip_search=false",),
    "5 % residual blocks": ("solver.residual=0.05",),
    "tuned codes": ("solver.tune=true",),
    "rtn": PLAIN,
}
"""Name -> keys on top of the format's default recipe."""


def checkpoints(layout: ModelLayout, own: CalibrationSet, other: CalibrationSet, work: Path) -> list[dict[str, Any]]:
    """A row of every format and variant, with what its checkpoint in `work` took."""
    blocks = sum(layout.num_blocks(expert) for expert in layout.experts)
    rows: list[dict[str, Any]] = []
    for name in ("hif4", "mxfp4"):
        for label, keys in VARIANTS.items():
            settings = QuantizeSettings(name, load_recipe(name, name, keys), label, {})
            out = work / f"{name}-{label.replace(' ', '-').replace('%', 'percent')}"
            start = time.process_time()
            bits = quantize(Job(layout, own, settings, out)).coverage.bits_with_basis
            seconds = (time.process_time() - start) / blocks
            error = denoiser_errors(layout, resolve_model(str(out)), other)["mean"]
            row = {"format": name, "variant": label, "checkpoint": str(out), "seconds_a_block": seconds}
            row |= {"bits": bits, "error": error}
            rows.append(row)
            ui.info(f"{name}, {label}: {row}")
    return rows


def time_videos(layout: ModelLayout, rows: list[dict[str, Any]], turns: int) -> None:
    """Add each row's median ratio of a video's time to the original's of the same turn."""
    pipes = {"original": load_pipeline(str(layout.path))}
    pipes |= {row["checkpoint"]: load_pipeline(row["checkpoint"]) for row in rows}
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(-1, turns):
        for name, pipe in pipes.items():
            pipe.set_progress_bar_config(disable=True)
            arguments = call_arguments(layout.preset, held_out_prompts(1)[0], 0) | {"output_type": "latent"}
            start = time.process_time()
            pipe(**arguments)
            if turn >= 0:  # the first one compiles
                times[name].append(time.process_time() - start)
    for row in rows:
        ratios = [own / base for own, base in zip(times[row.pop("checkpoint")], times["original"], strict=True)]
        row["video"] = statistics.median(ratios)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in docs/quality.md."""
    lines = ["| | error against rtn | bits a weight | a block | a video |", "|---|---|---|---|---|"]
    for row in rows:
        base = next(one["error"] for one in rows if one["format"] == row["format"] and one["variant"] == "rtn")
        lines.append(
            f"| {row['format']}, {row['variant']} | {row['error'] / base:.3f} | {row['bits']:.2f} | {row['seconds_a_block']:.2f} s | {row['video']:.2f}x |"
        )
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = sweep_parser(__doc__)
    parser.set_defaults(calibration_prompts=48)
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    layout = resolve_model(args.model)
    rows = checkpoints(layout, *record_both(args, layout), args.work)
    time_videos(layout, rows, args.turns)
    write_json(args.out / f"costs-{args.model}.json", rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
