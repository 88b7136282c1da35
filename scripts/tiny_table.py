"""The sensitivity table of docs/tiny.md: plain rounding and the default recipes on `tiny` and `tiny-outliers`.

    python scripts/tiny_table.py --work build/tiny-table --out docs/data/tiny-table.json

For each model, format and recipe (`--rows`): held-out denoiser error, prompt adherence over the same held-out units as the original,
and drift (PSNR to the original's videos). Everything goes through the stages as the commands do; a killed run resumes, so
--work must hold none of other code.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ablation import record
from held_out import denoiser_errors

from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.evaluation import evaluate_runs
from ptq.generation import Settings, identify_model, run_generation
from ptq.prompts import PromptSet, read_prompts
from ptq.quantization.job import Job
from ptq.quantization.run import quantize
from ptq.quantization.settings import QuantizeSettings
from ptq.store.files import write_json
from ptq.tiny.grammar import calibration_prompts, held_out_prompts, write_prompt_file
from ptq.wan.layout import ModelLayout
from ptq.wan.loading import load_pipeline, resolve_model

ROTATION = {"hif4": 64, "mxfp4": 32}
"""Format -> block size of its Hadamard rotation."""
ROWS = "rtn", "rtn + rotation", "default", "tuned"


def keys_of(row: str, format_name: str) -> tuple[str, tuple[str, ...]]:
    """Recipe and keys of one of `ROWS`."""
    if row.startswith("rtn"):
        rotated = ("scheme.transform=hadamard", f"scheme.block={ROTATION[format_name]}")
        return "rtn", rotated if "rotation" in row else ()
    return format_name, ("solver.tune=true",) if row == "tuned" else ()


def generate(name: str, layout: ModelLayout, found: PromptSet, out: Path) -> Path:
    """Generate one video a prompt."""
    settings = Settings(**layout.preset.model_dump(exclude={"variant", "hub_id"}), save_frames=True)
    identity = identify_model(name, layout.path)
    run_generation(lambda: load_pipeline(layout.path), found.samples, settings, out, model=identity)
    return out


def rows_of(
    model: str, work: Path, units: PromptSet, records: dict[str, list[str]], labels: list[str]
) -> list[dict[str, Any]]:
    """These rows of one model in each format, the original first."""
    layout = resolve_model(model)
    own, other = (record(model, layout, work, name, prompts) for name, prompts in records.items())
    reference = generate(model, layout, units, work / model / "videos" / "original")
    rows: list[dict[str, Any]] = []
    for format_name in ("hif4", "mxfp4"):
        for label in labels:
            recipe, overrides = keys_of(label, format_name)
            name = f"{format_name}-{label.replace(' ', '')}"
            checkpoint = work / model / name
            if not checkpoint.exists():
                settings = QuantizeSettings(format_name, load_recipe(recipe, format_name, overrides), recipe, {})
                quantize(Job(layout, own, settings, checkpoint))
            packed = resolve_model(str(checkpoint))
            candidate = generate(name, packed, units, work / model / "videos" / name)
            content = evaluate_runs(reference, candidate, work / model / "evaluation" / name, suite="tiny").as_json()
            if not rows:
                rows.append(
                    {"model": model, "format": "bf16", "recipe": "original", **_adherence(content, "reference")}
                )
            rows.append(
                {
                    "model": model,
                    "format": format_name,
                    "recipe": label,
                    "denoiser_error": denoiser_errors(layout, packed, other)["mean"],
                    **_adherence(content, "candidate"),
                    "psnr": content["paired"]["psnr"]["mean"],
                    "loss": content["aggregates"][content["gate"]],
                    "verdict": content["verdict"],
                }
            )
    return rows


def _adherence(content: dict[str, Any], role: str) -> dict[str, float]:
    return {name: content["dimensions"][name][role] for name in ("colour", "shape", "direction")}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in docs/tiny.md."""
    lines = [
        "| model | format | recipe | denoiser error | colour | shape | direction | PSNR | loss [95 %] | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], row["format"], row["recipe"]]
        cells.append(f"{row['denoiser_error']:.2e}" if "denoiser_error" in row else "-")
        cells += [f"{row[name]:.3f}" for name in ("colour", "shape", "direction")]
        if "psnr" in row:
            loss = row["loss"]
            cells += [
                f"{row['psnr']:.1f} dB",
                f"{loss['value']:+.2%} [{loss['low']:+.2%}, {loss['high']:+.2%}]",
                row["verdict"],
            ]
        else:
            cells += ["-", "-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-table"))
    parser.add_argument("--out", type=Path, default=Path("docs/data/tiny-table.json"))
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-outliers"])
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--rows", nargs="+", default=list(ROWS[:3]), choices=ROWS)
    parser.add_argument("--calibration-prompts", type=int, default=16)
    args = parser.parse_args()
    quiet_libraries()
    units = read_prompts(write_prompt_file(args.work, "units", held_out_prompts(args.units), images=False))
    # Records of other held-out prompts: another seed of the same fixed split.
    records = {
        "calibration": calibration_prompts(args.calibration_prompts),
        "held-out": held_out_prompts(12, seed=8),
    }
    rows = [row for model in args.models for row in rows_of(model, args.work, units, records, args.rows)]
    write_json(args.out, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
