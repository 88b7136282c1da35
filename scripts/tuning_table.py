"""What tuning the codes of a block is worth on held-out records, with and without residual blocks; for docs/quality.md.

    python scripts/tuning_table.py --model tiny --work build/tuning --out docs/data

Of each recipe and damping: solved, and solved and tuned; both without and with residual blocks. Records and measure are those of
scripts/ablation.py; what decides whether a block keeps its tuned codes is held out of the calibration records, not of these. Writes
<out>/tuning-<model>.json after each recipe.
"""

from __future__ import annotations

import torch
from ablation import record_both, sweep_parser
from block_sizes import RECIPES
from residual_table import Chosen, Expert

from ptq import ui
from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.quantization.settings import QuantizeSettings
from ptq.store.files import write_json
from ptq.wan.loading import resolve_model


def variants(recipe: str, damping: float, share: float, tunings: list[str]) -> dict[str, QuantizeSettings]:
    """What is tuned, as `solver.tune` says it -> settings."""
    fmt, found = RECIPES[recipe], {}
    for tune in ("false", *tunings):
        keys = (f"solver.damping={damping}", f"solver.residual={share}", f"solver.tune={tune}")
        found[tune] = QuantizeSettings(fmt, load_recipe(recipe, fmt, keys), recipe, {})
    return found


@torch.no_grad()
def main() -> None:
    parser = sweep_parser(__doc__)
    parser.set_defaults(calibration_prompts=48)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.03, 0.01, 0.1])
    parser.add_argument("--tunings", nargs="+", default=["true"], help="values of solver.tune")
    parser.add_argument("--share", type=float, default=0.05)
    args = parser.parse_args()
    quiet_libraries()
    layout = resolve_model(args.model)
    own, other = record_both(args, layout)
    experts = {name: Expert(layout, name, own, other) for name in layout.experts}
    base: dict[str, float] = {}
    table: list[dict] = []
    for damping in args.dampings:
        for recipe in args.recipes:
            fmt = RECIPES[recipe]
            settings = variants(recipe, damping, args.share, args.tunings)
            if fmt not in base:
                settings["rtn"] = QuantizeSettings(fmt, load_recipe("rtn", fmt), "rtn", {})
            errors: dict[tuple[str, str], dict[str, float]] = {}
            kept = dict.fromkeys(settings, 0)
            for expert, one in experts.items():
                for tune, solved in one.solve(settings).items():
                    kept[tune] += solved.kept
                    choices: dict[str, Chosen | None] = {"none": None}
                    if solved.gains:
                        choices[f"{args.share:g}"] = solved.choose(args.share, solved.gains.__getitem__)
                    for blocks, chosen in choices.items():
                        errors.setdefault((tune, blocks), {})[expert] = error = one.error(solved, chosen)
                        ui.info(f"damping {damping:g}, {recipe}, {expert}, tune {tune}, residual {blocks}: {error:.4e}")
            means = {label: sum(found.values()) / len(found) for label, found in errors.items()}
            if fmt not in base:
                base[fmt] = means.pop(("rtn", "none"))
            for (tune, blocks), mean in means.items():
                row = {"recipe": recipe, "damping": damping, "tune": tune, "residual": blocks, "error": mean}
                row |= {"ratio": mean / base[fmt], "blocks_kept": kept[tune], **errors[tune, blocks]}
                table.append(row)
                ui.info(f"damping {damping:g}, {recipe}, tune {tune}, residual {blocks}: {row['ratio']:.4f} of rtn")
            write_json(args.out / f"tuning-{args.model}.json", table)


if __name__ == "__main__":
    main()
