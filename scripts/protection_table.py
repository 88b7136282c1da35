"""Chosen high-precision blocks against fixed priors and random ones, on held-out records; for docs/quality.md.

    python scripts/protection_table.py --checkpoint CKPT --calibration RECORDS --held-out OTHER_RECORDS --out table.json

CKPT is a checkpoint of `tiny` without high-precision blocks. Blocks are chosen on the calibration records, greedily, up to
the format's budget; every choice is then judged on the held-out ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ptq.checkpoint.manifest import read_manifest
from ptq.checkpoint.shards import ShardSet
from ptq.cli.common import quiet_libraries
from ptq.quantization.job import Job
from ptq.quantization.sensitivity import Sensitivity, build_sensitivity
from ptq.quantization.settings import QuantizeSettings
from ptq.rules import RULES
from ptq.store.calibration import CalibrationSet
from ptq.store.files import write_json
from ptq.wan.loading import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    for name in ("checkpoint", "calibration", "held-out", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    quiet_libraries()
    original, packed = resolve_model(args.model), resolve_model(str(args.checkpoint))

    manifest = read_manifest(args.checkpoint)
    settings = QuantizeSettings(manifest.format, manifest.recipe, manifest.recipe_name, {})
    codes = {name: ShardSet(packed.path / name) for name in packed.experts}

    def sensitivity(records: Path) -> Sensitivity:
        job = Job(original, CalibrationSet(records), settings, args.checkpoint)
        return build_sensitivity(job, codes, packed.experts)

    budget = RULES[manifest.format].blocks
    chosen = [(pick.expert, pick.block) for pick in sensitivity(args.calibration).greedy(budget, "total")]
    judge = sensitivity(args.held_out)
    table = {"none": judge.error([]), "auto": judge.error(chosen)}
    for name, draws in judge.priors(len(chosen)).items():
        table[name] = sum(judge.error(draw) for draw in draws) / len(draws)
    write_json(args.out, {"format": manifest.format, "chosen": chosen, "held_out_error": table})
    print(json.dumps({"chosen": chosen, "held_out_error": table}, indent=1))


if __name__ == "__main__":
    main()
