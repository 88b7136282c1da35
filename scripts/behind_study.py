"""Is the low-noise expert better calibrated on the latents that the quantized high-noise one hands it? The table of docs/log.md.

    python scripts/behind_study.py --work build/behind --out docs/data/behind.json

For each format and damping two checkpoints with the same high-noise expert: "default", whose low-noise records are the
original's, and "behind", whose low-noise records are of the same prompts and noise with the packed high-noise expert in front.
Both make the units of `ptq demo --units N` and are judged against the original's videos, and behind against default: losses and
PSNR are paired. Held-out denoiser errors of the low-noise expert are on records of both kinds. Finished parts are kept: the
same command goes on where it stopped, so --work must hold none of other code.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from ablation import record
from held_out import denoiser_errors
from tiny_table import generate

from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.evaluation import evaluate_runs
from ptq.prompts import read_prompts
from ptq.quantization.job import Job
from ptq.quantization.run import quantize
from ptq.quantization.settings import QuantizeSettings
from ptq.store.calibration import CalibrationSet, DenoiserCall
from ptq.store.evaluation import Evaluation
from ptq.store.evaluation_units import FILE as UNITS_FILE
from ptq.store.files import digest, write_json
from ptq.store.records import Record
from ptq.tiny.grammar import calibration_prompts, held_out_prompts, write_prompt_file
from ptq.wan.layout import ModelLayout
from ptq.wan.loading import load_pipeline, resolve_model

FORMATS = ("hif4", "mxfp4")
DAMPINGS = (0.03, 0.01, 0.1)
KINDS = ("default", "behind")
HIGH, LOW = "transformer", "transformer_2"
PROMPTS = {"calibration": calibration_prompts(16), "other": held_out_prompts(12, seed=8)}
"""Sets of records: those of the demo, and those of docs/tiny.md's held-out errors."""


class Behind(CalibrationSet):
    """The records of `own`, with the latents of the low-noise ones from `behind`, which has the same records."""

    def __init__(self, own: CalibrationSet, behind: CalibrationSet) -> None:
        super().__init__(own.directory)
        assert own.records == behind.records
        self.behind, self.digest = behind, digest([own.digest, behind.digest])

    def load(self, record: Record) -> DenoiserCall:
        """As of `CalibrationSet`."""
        return self.behind.load(record) if record.expert == LOW else super().load(record)


def record_behind(model: str, layout: ModelLayout, packed: Path, work: Path, name: str) -> CalibrationSet:
    """The records of PROMPTS[name] with the packed high-noise expert in the original pipeline."""

    def load() -> Any:
        pipeline = load_pipeline(model)
        pipeline.transformer = load_pipeline(packed).transformer
        return pipeline

    return record(model, layout, work, name, PROMPTS[name], load=load)


def moved(own: CalibrationSet, behind: CalibrationSet) -> float:
    """Squared distance of the low-noise latents, relative to their squares."""
    pairs = [(own.load(one)[0].double(), behind.load(one)[0].double()) for one in own.of_expert(LOW)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


def psnr_gain(default: Path, behind: Path) -> dict[str, float]:
    """Mean of PSNR(behind) - PSNR(default), both to the original, over the units, and its 95 % interval."""

    def read(folder: Path) -> dict[str, float]:
        lines = (json.loads(line) for line in (folder / UNITS_FILE).read_text().splitlines())
        return {line["unit"]: line["paired"]["psnr"] for line in lines}

    one, other = read(default), read(behind)
    gains = [other[unit] - one[unit] for unit in one]
    value, half = statistics.fmean(gains), 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))
    return {"value": value, "low": value - half, "high": value + half}


def errors(model: str, fmt: str, damping: float, work: Path) -> dict[str, Any]:
    """Both checkpoints of one format and damping: how far the latents moved, and held-out errors."""
    layout, folder = resolve_model(model), work / f"{fmt}-{damping:g}"
    own = {name: record(model, layout, work, name, prompts) for name, prompts in PROMPTS.items()}
    result: dict[str, Any] = {"format": fmt, "damping": damping}
    sets: dict[str, CalibrationSet] = dict(own)
    for kind in KINDS:
        checkpoint = folder / kind
        if not checkpoint.exists():
            recipe = load_recipe(fmt, fmt, (f"solver.damping={damping}",))
            quantize(Job(layout, sets["calibration"], QuantizeSettings(fmt, recipe, fmt, {}), checkpoint))
        if kind == "default":
            made = {name: record_behind(model, layout, checkpoint, folder, name) for name in PROMPTS}
            result["latents_moved"] = moved(own["calibration"], made["calibration"])
            sets = {name: Behind(own[name], made[name]) for name in PROMPTS}
        packed = resolve_model(str(checkpoint))
        found = {name: denoiser_errors(layout, packed, one["other"]) for name, one in (("own", own), ("behind", sets))}
        result[kind] = {f"low_error_on_{name}": error[LOW] for name, error in found.items()}
        result[kind]["high_error"] = found["own"][HIGH]
    return result


def gate(model: str, units: int, work: Path, row: dict[str, Any]) -> None:
    """Add the losses of both checkpoints of a row of `errors`, and of behind against default."""
    layout, folder = resolve_model(model), work / f"{row['format']}-{row['damping']:g}"
    found = read_prompts(write_prompt_file(work, "held-out", held_out_prompts(units), images=False))
    original = generate(model, layout, found, work / "original")
    runs = {}
    for kind in KINDS:
        name = f"{folder.name}-{kind}"
        runs[kind] = generate(name, resolve_model(str(folder / kind)), found, folder / "videos" / kind)
        judged = evaluate_runs(original, runs[kind], folder / "evaluation" / kind, suite="tiny")
        row[kind] |= {"loss": loss(judged), "verdict": judged.verdict, "psnr": judged.paired["psnr"].mean}
    default, behind = (runs[kind] for kind in KINDS)
    row["loss_against_default"] = loss(evaluate_runs(default, behind, folder / "evaluation" / "paired", suite="tiny"))
    row["psnr_gain"] = psnr_gain(*(folder / "evaluation" / kind for kind in KINDS))
    row["units"] = units


def loss(judged: Evaluation) -> dict[str, Any]:
    """The deciding average with its interval."""
    assert judged.deciding is not None
    return judged.deciding.model_dump()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-outliers")
    parser.add_argument("--work", type=Path, default=Path("build/behind"))
    parser.add_argument("--out", type=Path, default=Path("docs/data/behind.json"))
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--dampings", type=float, nargs="+", default=DAMPINGS)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    rows = []
    for damping, fmt in itertools.product(args.dampings, FORMATS):
        rows.append(errors(args.model, fmt, damping, args.work))
        print(json.dumps(rows[-1]), flush=True)
        write_json(args.out, rows)
    for row in rows:
        gate(args.model, args.units, args.work, row)
        print(json.dumps(row), flush=True)
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
