"""What tuning the codes of a block is worth on held-out records, with and without residual blocks; for docs/quality.md.

    python scripts/tuning_table.py --model tiny --work build/tuning --out docs/data

Of each recipe and damping: solved, and solved and tuned; both without and with residual blocks. Records and measure are those of
scripts/ablation.py; what decides whether a block keeps its tuned codes is held out of the calibration records, not of these. Writes
<out>/tuning-<model>.json after each damping.
"""

from __future__ import annotations

import time

import torch
from ablation import record_both, sweep_parser
from residual_table import RECIPES, Chosen, Expert

from ptq import ui
from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.quantization.settings import QuantizeSettings
from ptq.scheme import get_format
from ptq.store.files import write_json
from ptq.wan.loading import resolve_model

Label = tuple[str, float, str, str]
"""Recipe, damping, what was tuned, residual blocks."""


def variants(damping: float, share: float, tunings: list[str]) -> dict[tuple[str, str], QuantizeSettings]:
    """(recipe, tuning) -> settings."""
    found = {}
    for name, fmt in RECIPES.items():
        for tune in ("false", *tunings):
            keys = (f"solver.damping={damping}", f"solver.residual={share}", f"solver.tune={tune}")
            found[name, tune] = QuantizeSettings(fmt, load_recipe(name, fmt, keys), name, {})
    return found


@torch.no_grad()
def main() -> None:
    parser = sweep_parser(__doc__)
    parser.set_defaults(calibration_prompts=48)
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.03, 0.01, 0.1])
    parser.add_argument("--tunings", nargs="+", default=["true"], help="values of solver.tune")
    parser.add_argument("--share", type=float, default=0.05)
    args = parser.parse_args()
    quiet_libraries()
    layout = resolve_model(args.model)
    own, other = record_both(args, layout)
    experts = {name: Expert(layout, name, own, other) for name in layout.experts}
    rtn = {fmt: QuantizeSettings(fmt, load_recipe("rtn", fmt), "rtn", {}) for fmt in set(RECIPES.values())}
    base = {fmt: 0.0 for fmt in rtn}
    for one in experts.values():
        for fmt, solved in one.solve(rtn).items():
            base[fmt] += one.error(solved) / len(experts)
    for fmt, error in base.items():
        ui.info(f"rtn, {get_format(fmt).title}: {error:.4e}")
    table: list[dict] = []
    for damping in args.dampings:
        errors: dict[Label, dict[str, float]] = {}
        kept: dict[tuple[str, str], int] = {}
        for expert, one in experts.items():
            settings = variants(damping, args.share, args.tunings)
            start = time.process_time()
            for (name, tune), solved in one.solve(settings).items():
                kept[name, tune] = kept.get((name, tune), 0) + solved.kept
                choices: dict[str, Chosen | None] = {"none": None}
                choices[f"{args.share:g}"] = solved.choose(args.share, solved.gains.__getitem__)
                for blocks, chosen in choices.items():
                    errors.setdefault((name, damping, tune, blocks), {})[expert] = one.error(solved, chosen)
            ui.info(f"damping {damping:g}, {expert}: {time.process_time() - start:.0f} s of processor time")
        for (name, _, tune, blocks), found in errors.items():
            mean = sum(found.values()) / len(found)
            row = {"recipe": name, "damping": damping, "tune": tune, "residual": blocks, "error": mean, **found}
            table.append(row | {"ratio": mean / base[RECIPES[name]], "blocks_kept": kept[name, tune]})
            ui.info(f"damping {damping:g}, {name}, tune {tune}, residual {blocks}: {table[-1]['ratio']:.4f}")
        write_json(args.out / f"tuning-{args.model}.json", table)


if __name__ == "__main__":
    main()
