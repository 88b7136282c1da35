"""The ablation tables of docs/quality.md: every ingredient's own effect, from one set of records a model.

    python scripts/ablation.py --model tiny --work build/ablation --out docs/data

Records 24 calibration prompts and 16 held-out prompts once, then solves every variant from the same block statistics
(ptq.quantization.sweep). Errors are held-out: squared denoiser-output error relative to the original's output, weighted by
d_sigma^2, mean over the experts. Writes <out>/quality-<model>-<format>.json and a bar chart beside docs/img.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from ptq import formats
from ptq.calibration.records import CalibrationSet
from ptq.calibration.run import CalibrationPlan, calibrate
from ptq.cli.common import quiet_libraries
from ptq.config import Recipe, load_recipe
from ptq.prompts import read_prompts
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.sweep import SweepRow, sweep
from ptq.scheme import BLOCK_SIZES
from ptq.store.files import write_json
from ptq.tiny.grammar import calibration_prompts, held_out_prompts
from ptq.tiny.prompt_files import write_prompt_file
from ptq.wan.layout import ModelLayout
from ptq.wan.loading import load_pipeline, resolve_model

OFF = {
    "rounding": "rtn",
    "rotation": 0,
    "smoothing": (),
    "learned_transform": False,
    "clip_search": False,
    "bias_correction": False,
}
SMOOTHING = {"smoothing": (0.4, 0.5, 0.6)}
LEARNED = {"smoothing": (), "learned_transform": True}
DAMPINGS = (0.01, 0.1)


def variants(default: Recipe, format_name: str, widths: set[int]) -> dict[str, Recipe]:
    """Name -> recipe: the ladder, each ingredient alone, all without each, other values of keys.

    Args:
        widths: every K of the model; only rotations that divide them all are tried.
    """
    fmt = formats.get(format_name)
    gptq, clip = ({key: getattr(default, key)} for key in ("rounding", "clip_search"))
    bias = {"bias_correction": True}  # not in the default recipes: the gate's loss is smaller without
    rotation, activations = {"rotation": default.rotation}, {"activations": default.activations}
    plain = default.model_copy(update=OFF | {"activations": Recipe().activations})
    chosen: dict[str, Recipe] = {"rtn": plain}
    steps = {"rotation": rotation, "smoothing": SMOOTHING, "learned transform": LEARNED}
    steps |= {"gptq": gptq, "clip": clip, "bias": bias}
    recipe = plain
    for name, update in steps.items():
        recipe = recipe.model_copy(update=update)
        chosen[f"rtn + ... + {name}"] = recipe
    chosen["default recipe (all without bias)"] = default
    everything = default.model_copy(update=bias)
    chosen["all"] = everything
    only = steps | {"learned transform": rotation | LEARNED, "activation scales": activations}
    for name, update in only.items():
        chosen[f"only {name}"] = plain.model_copy(update=update)
    without = {
        "any change of basis": {"rotation": 0, "learned_transform": False},
        "learned transform": {"learned_transform": False},
        **{name: {key: OFF[key] for key in steps[name]} for name in ("gptq", "clip")},
        "activation scales": {"activations": Recipe().activations},
    }
    for name, update in without.items():
        chosen[f"all without {name}"] = everything.model_copy(update=update)
    smoothed = {"learned_transform": False} | SMOOTHING
    chosen["all, smoothing for learned transform"] = everything.model_copy(update=smoothed)
    for size in (size for size in BLOCK_SIZES if all(k % size == 0 for k in widths)):
        learned = default.learned_transform and size % fmt.group_size == 0
        label = f"all, blocks of {size}" if learned else f"all, smoothing for learned transform, blocks of {size}"
        chosen[label] = everything.model_copy(update={"rotation": size} | ({} if learned else smoothed))
    for rule in fmt.scale_rules:
        scales = everything.activations.model_copy(update={"scale_rule": rule})
        chosen[f"all, activations {rule}"] = everything.model_copy(update={"activations": scales})
    for damping in DAMPINGS:
        chosen[f"all, damping {damping:g}"] = everything.model_copy(
            update={"gptq": everything.gptq.model_copy(update={"damping": damping})}
        )
    return chosen


def record(model: str, layout: ModelLayout, work: Path, name: str, prompts: list[str]) -> CalibrationSet:
    """Record (or reuse) denoiser inputs of these prompts."""
    found = read_prompts(write_prompt_file(work, name, prompts, images=False))
    source = {"name": found.path.name, "sha256": found.sha256}
    out = work / f"{model}-{name}"
    calibrate(CalibrationPlan(layout, layout.preset, found.samples, 8, 0, source), lambda: load_pipeline(model), out)
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


def plot(table: list[dict], title: str, path: Path) -> None:
    """Horizontal bars of the held-out error, relative to rtn."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.28 * len(table) + 1.2))
    names = [row["variant"] for row in table][::-1]
    axes.barh(names, [row["ratio"] for row in table][::-1], color="#4477aa")
    axes.axvline(0.5, color="#cc3311", linewidth=1, linestyle="--")
    axes.set_xlabel("held-out denoiser error relative to rtn (dashed: goal 0.50)")
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
    args = parser.parse_args()
    quiet_libraries()
    layout = resolve_model(args.model)
    own, other = record_both(args, layout)
    for name in args.formats:
        widths = {k for expert in layout.experts for _, k in layout.linear_shapes(expert).values()}
        recipes = variants(load_recipe(name, name), name, widths)
        settings = {label: QuantizeSettings(name, recipe, label, {}) for label, recipe in recipes.items()}
        table = as_table(sweep(layout, own, other, settings))
        write_json(args.out / f"quality-{args.model}-{name}.json", table)
        plot(table, f"{args.model}, {name}", args.figures / f"quality-{args.model}-{name}.png")
        print(
            json.dumps([{key: row[key] for key in ("variant", "error", "ratio", "gain_db")} for row in table], indent=1)
        )


if __name__ == "__main__":
    main()
