"""Held-out denoiser error of the default recipes by the block size of the learned transform, over three dampings.

    python scripts/block_sizes.py --model tiny --work build/ablation --out docs/data

Errors as in scripts/ablation.py, relative to plain rounding; writes <out>/block-sizes-<model>.json: of each recipe and size the
mean and the range over the dampings.
"""

from __future__ import annotations

import json

from ablation import PLAIN, record_both, sweep_parser
from held_out import sweep

from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.quantization.settings import QuantizeSettings
from ptq.store.files import write_json
from ptq.wan.loading import resolve_model

RECIPES = {"hif4": "hif4", "hif4-fast": "hif4", "mxfp4": "mxfp4"}
"""Recipe -> its format."""
SIZES = (64, 128)
DAMPINGS = (0.01, 0.03, 0.1)


def main() -> None:
    parser = sweep_parser(__doc__)
    args = parser.parse_args()
    quiet_libraries()
    layout = resolve_model(args.model)
    own, other = record_both(args, layout)
    table = []
    for name, fmt in RECIPES.items():
        recipes = {"rtn": load_recipe(fmt, fmt, PLAIN)}
        for size in SIZES:
            for damping in DAMPINGS:
                keys = (f"scheme.block={size}", f"solver.damping={damping}")
                recipes[f"{size}, {damping:g}"] = load_recipe(name, fmt, keys)
        settings = {label: QuantizeSettings(fmt, recipe, label, {}) for label, recipe in recipes.items()}
        rtn, *rows = (row.error for row in sweep(layout, own, other, settings))
        for at, size in enumerate(SIZES):
            ratios = [error / rtn for error in rows[at * len(DAMPINGS) : (at + 1) * len(DAMPINGS)]]
            figures = {"mean": sum(ratios) / len(ratios), "least": min(ratios), "most": max(ratios)}
            table.append({"recipe": name, "block": size} | {key: round(value, 4) for key, value in figures.items()})
            print(json.dumps(table[-1]), flush=True)
    write_json(args.out / f"block-sizes-{args.model}.json", table)


if __name__ == "__main__":
    main()
