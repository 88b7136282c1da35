"""The ablation tables of docs/quality.md: every ingredient's own effect, from one set of records a model.

    python scripts/ablation.py --model tiny --work build/ablation --out docs/data

Records 24 calibration prompts and 16 held-out prompts once, then solves every variant from the same block statistics
(scripts/held_out.py). Errors are held-out: squared denoiser-output error relative to the original's output, weighted by
d_sigma^2, mean over the experts. Writes <out>/quality-<model>-<format>.json and a bar chart, and prints the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from held_out import SweepRow, sweep

from ptq.calibration.run import CalibrationPlan, calibrate
from ptq.cli.common import quiet_libraries
from ptq.config import Recipe, list_configs, load_recipe
from ptq.prompts import read_prompts
from ptq.quantization.settings import QuantizeSettings
from ptq.scheme import get_format
from ptq.scheme.hadamard import BLOCK_SIZES
from ptq.store.calibration import CalibrationSet
from ptq.store.files import write_json
from ptq.tiny.grammar import calibration_prompts, held_out_prompts, write_prompt_file
from ptq.wan.layout import ModelLayout
from ptq.wan.loading import load_pipeline, resolve_model

PLAIN: tuple[str, ...] = (
    "scheme.transform=none",
    "scheme.input_rule=null",
    "solver.rounding=rtn",
    "solver.clip_search=false",
)
SMOOTHING: tuple[str, ...] = ("scheme.transform=smoothed", "solver.smoothing=[0.4, 0.5, 0.6]")
DAMPINGS = (0.01, 0.1)


def variants(format_name: str, widths: set[int]) -> dict[str, Recipe]:
    """Name -> recipe: the ladder, each ingredient alone, all without each, other values of keys.

    Args:
        widths: every K of the model; only blocks that divide one of them are tried.
    """
    fmt = get_format(format_name)
    rule = load_recipe(format_name, format_name).scheme.input_rule
    steps: dict[str, tuple[str, ...]] = {
        "rotation": ("scheme.transform=hadamard",),
        "smoothing": SMOOTHING,
        "learned transform": ("scheme.transform=learned", "solver.smoothing=[]"),
        "gptq": ("solver.rounding=gptq",),
        "clip": ("solver.clip_search=true",),
    }
    chosen = {"rtn": PLAIN}
    ladder: tuple[str, ...] = PLAIN
    for name, update in steps.items():
        ladder = ladder + update
        chosen[f"rtn + ... + {name}"] = ladder
    chosen["default recipe"] = ()
    for name, update in (steps | {"activation scales": (f"scheme.input_rule={rule}",)}).items():
        alone = ("scheme.block=0",) if name == "smoothing" else ()  # without a rotation
        chosen[f"only {name}"] = (*PLAIN, *update, *alone)
    without: dict[str, tuple[str, ...]] = {
        "any change of basis": ("scheme.transform=none",),
        "learned transform": ("scheme.transform=hadamard",),
        "gptq": ("solver.rounding=rtn",),
        "clip": ("solver.clip_search=false",),
        "activation scales": ("scheme.input_rule=null",),
    }
    chosen |= {f"all without {name}": update for name, update in without.items()}
    chosen["all, smoothing for learned transform"] = SMOOTHING
    for size in (size for size in BLOCK_SIZES if any(k % size == 0 for k in widths)):
        learned = size % fmt.group_size == 0
        label = f"all, blocks of {size}" if learned else f"all, smoothing for learned transform, blocks of {size}"
        chosen[label] = (*(() if learned else SMOOTHING), f"scheme.block={size}")
    chosen |= {f"all, activations {rule}": (f"scheme.input_rule={rule}",) for rule in fmt.scale_rules}
    chosen |= {f"all, damping {damping:g}": (f"solver.damping={damping}",) for damping in DAMPINGS}
    found = {name: load_recipe(format_name, format_name, overrides) for name, overrides in chosen.items()}
    others = [name for name in list_configs("recipes") if name.startswith(f"{format_name}-")]
    return found | {f"recipe {name}": load_recipe(name, format_name) for name in others}


def record(
    model: str,
    layout: ModelLayout,
    work: Path,
    name: str,
    prompts: list[str],
    records_per_prompt: int = 8,
    load: Callable[[], Any] | None = None,
) -> CalibrationSet:
    """Record (or reuse) denoiser inputs of these prompts, from the pipeline that `load` gives (None: the model's own)."""
    found = read_prompts(write_prompt_file(work, name, prompts, images=False))
    source = {"name": found.path.name, "sha256": found.sha256}
    out = work / f"{model}-{name}"
    plan = CalibrationPlan(layout, layout.preset, found.samples, records_per_prompt, 0, source)
    calibrate(plan, load or (lambda: load_pipeline(model)), out)
    return CalibrationSet(out)


def as_table(rows: list[SweepRow]) -> list[dict]:
    """JSON rows; `ratio` is against rtn, `gain_db` the same in decibels."""
    base = rows[0].error
    return [
        {
            "variant": row.name,
            "error": row.error,
            **{f"error_{expert}": error for expert, error in row.errors.items()},
            "ratio": row.error / base,
            "gain_db": 10 * math.log10(base / row.error),
            "layer_error": row.layer_error,
            "solve_seconds": round(row.seconds, 2),
        }
        for row in rows
    ]


def markdown(table: list[dict]) -> str:
    """The table as it stands in docs/quality.md."""
    lines = ["| variant | held-out error | relative to rtn | gain |", "|---|---|---|---|"]
    for row in table:
        lines.append(f"| {row['variant']} | {row['error']:.2e} | {row['ratio']:.3f} | {row['gain_db']:+.2f} dB |")
    return "\n".join(lines)


def plot(table: list[dict], title: str, path: Path) -> None:
    """Horizontal bars of the held-out error, relative to rtn."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.28 * len(table) + 1.2))
    names = [row["variant"] for row in table][::-1]
    axes.barh(names, [row["ratio"] for row in table][::-1], color="#4477aa")
    axes.margins(y=0.01)
    axes.set_xlabel("held-out denoiser error relative to rtn")
    axes.set_title(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sweep_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a script that sweeps over one model's records."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("build/ablation"))
    parser.add_argument("--out", type=Path, default=Path("docs/data"))
    parser.add_argument("--calibration-prompts", type=int, default=24)
    parser.add_argument("--held-out-prompts", type=int, default=16)
    return parser


def record_both(args: argparse.Namespace, layout: ModelLayout) -> tuple[CalibrationSet, CalibrationSet]:
    """Calibration records and held-out records, by the options of `sweep_parser`."""
    own = record(args.model, layout, args.work, "calibration", calibration_prompts(args.calibration_prompts))
    return own, record(args.model, layout, args.work, "held-out", held_out_prompts(args.held_out_prompts))


def main() -> None:
    parser = sweep_parser(__doc__)
    parser.add_argument("--formats", nargs="+", default=["hif4", "mxfp4"])
    parser.add_argument("--figures", type=Path, default=Path("docs/img"))
    parser.add_argument("--only", nargs="+", help="variants to solve; the first is what the others are relative to")
    args = parser.parse_args()
    quiet_libraries()
    layout = resolve_model(args.model)
    widths = {k for expert in layout.experts for _, k in layout.linear_shapes(expert).values()}
    tables = {name: variants(name, widths) for name in args.formats}
    for name, recipes in tables.items():
        if unknown := set(args.only or ()) - set(recipes):
            parser.error(
                f"--only: {name} has no {', '.join(sorted(unknown))}; it has {', '.join(recipes)}. Choose --formats to match."
            )
    own, other = record_both(args, layout)
    for name, recipes in tables.items():
        recipes = {label: recipes[label] for label in args.only or recipes}
        settings = {label: QuantizeSettings(name, recipe, label, {}) for label, recipe in recipes.items()}
        table = as_table(sweep(layout, own, other, settings))
        write_json(args.out / f"quality-{args.model}-{name}.json", table)
        plot(table, f"{args.model}, {name}", args.figures / f"quality-{args.model}-{name}.png")
        print(f"### {get_format(name).title}\n\n{markdown(table)}\n")


if __name__ == "__main__":
    main()
