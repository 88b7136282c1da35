"""What residual blocks are worth on held-out records, beside other choices of as many products; for docs/quality.md.

    python scripts/residual_table.py --model tiny --calibration-prompts 48 --work build/residual --out docs/data

For each recipe and damping the codes are solved once; a row then differs in its residual blocks alone. The controls, of the
first damping and share:
 - random: blocks drawn;
 - even: measured noise, every input as sensitive as another;
 - closed form: energy of the input's block times that of the weight's columns, times the sensitivity, nothing measured;
 - a budget a block: the measured ranking, each transformer block on its own;
 - bf16: the columns of the best blocks unquantized on both sides. A product of 16 bits counts as four of 4 bits and replaces
   one, so a third as many.
Records and measure are those of scripts/ablation.py. Writes <out>/residual-<model>.json after each damping.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from ablation import record_both, sweep_parser
from block_sizes import RECIPES
from torch import Tensor, nn

from ptq import ui
from ptq.checkpoint.shards import ShardSet
from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.quantization.block import collect_statistics, find_and_collect, forward_stream, install, solve_block
from ptq.quantization.calls import ExpertCalls
from ptq.quantization.residual import input_gains, probed
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.shared_inputs import InputGroup
from ptq.quantization.tune import Tuner
from ptq.runtime import QuantLinear
from ptq.scheme import get_format
from ptq.scheme.residual import columns
from ptq.solvers.residual import BlockGains, choose_blocks
from ptq.solvers.solve import LayerSolution
from ptq.solvers.stats import InputStats
from ptq.store.files import write_json
from ptq.wan.layout import ModelLayout
from ptq.wan.loading import resolve_model
from ptq.wan.replay import ExpertReplay, run_block

PRODUCT_OF_BF16 = 4

Key = tuple[int, tuple[str, ...]]
"""A block and the Linears of one of its inputs."""
Chosen = Mapping[Key, tuple[int, ...]]


class WideBlocks(nn.Module):
    """A quantized Linear that multiplies some blocks unquantized; weight_nk: the original weight in the basis."""

    def __init__(self, layer: QuantLinear, weight_nk: Tensor, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.at = layer, columns(torch.arange(layer.in_features), blocks)
        self.weight_nk = layer.packed.decode()
        self.weight_nk[:, self.at] = weight_nk[:, self.at]

    def forward(self, x: Tensor) -> Tensor:
        changed = self.layer.scheme.transform_input(x, self.layer.basis)
        values = self.layer.scheme.quantize_input(x, self.layer.basis)
        values[..., self.at] = changed[..., self.at]
        return nn.functional.linear(values, self.weight_nk, self.layer.bias)


@dataclass
class Solved:
    """One recipe on one expert: solutions of each block, measured gains and closed-form ones of each input, blocks that kept what
    tuning made of their codes."""

    settings: QuantizeSettings
    solutions: list[dict[str, LayerSolution]]
    gains: dict[Key, BlockGains]
    closed: dict[Key, BlockGains]
    kept: int = 0

    @property
    def products(self) -> int:
        return sum(one.codes.elements.numel() for block in self.solutions for one in block.values())

    def choose(self, share: float, worth: Callable[[Key], BlockGains]) -> Chosen:
        return choose_blocks({key: worth(key) for key in self.gains}, share * self.products)

    def by_block(self, share: float) -> Chosen:
        chosen: dict[Key, tuple[int, ...]] = {}
        for index, block in enumerate(self.solutions):
            own = {key: one for key, one in self.gains.items() if key[0] == index}
            chosen |= choose_blocks(own, share * sum(one.codes.elements.numel() for one in block.values()))
        return chosen


def closed_form(stats: InputStats, names: tuple[str, ...], solutions: Mapping[str, LayerSolution], settings) -> list:
    """Of each block: energy of the input times that of the weight's columns, relative to the output's."""
    basis = solutions[names[0]].basis
    x_tk, blocks = settings.scheme.transform_input(stats.x_tk, basis), range(stats.k // 64)
    total = [0.0 for _ in blocks]
    for name in names:
        w_nk = settings.scheme.format.dequantize(solutions[name].codes)
        signal = float((x_tk @ w_nk.T).square().sum())
        for block in blocks:
            energies = (float(columns(one, (block,)).square().sum()) for one in (x_tk, w_nk))
            total[block] += next(energies) * next(energies) / signal
    return total


class Expert:
    """An expert's blocks, and the streams of its calibration and held-out records."""

    def __init__(self, layout: ModelLayout, name: str, own, other) -> None:
        self.replay = ExpertReplay(ShardSet(layout.path / name), layout.experts[name])
        self.targets = list(layout.linear_shapes(name))
        self.own, self.other = (ExpertCalls(name, self.replay, records) for records in (own, other))
        self.blocks = [self.replay.load_block(index) for index in range(self.replay.num_blocks)]
        self.reference = self.other.start()
        for block in self.blocks:
            self._forward(block, self.reference)

    def _forward(self, block: nn.Module, stream) -> None:
        forward_stream(block, self.other.batches, stream, stream, self.replay.device)

    def _tuner(self, settings: QuantizeSettings) -> Tuner:
        tune = settings.recipe.solver.tune
        assert tune is not None
        return Tuner(self.own.batches, tune, settings.scheme, settings.seed, self.replay.device)

    def solve(self, recipes: Mapping[str, QuantizeSettings]) -> dict[str, Solved]:
        solved = {name: Solved(settings, [], {}, {}) for name, settings in recipes.items()}
        stream, some = self.own.start(), next(iter(recipes.values()))
        groups: list[InputGroup] = []
        probes = probed(self.own.batches)
        tuners = {name: self._tuner(settings) for name, settings in recipes.items() if settings.recipe.solver.tune}
        for index, block in enumerate(self.blocks):
            for tuner in tuners.values():
                tuner.keep(stream)
            before = [probe.of(stream).clone() for probe in probes]
            replayed = (self.own.batches, stream, some, self.replay.device)
            if groups:
                collectors = collect_statistics(block, groups, *replayed)
            else:
                groups, collectors = find_and_collect(block, self.targets, *replayed)
            after = [probe.of(stream) for probe in probes]
            stats = {group.names: collectors[group.names[0]].stats() for group in groups}

            def outputs(block=block, before=before) -> list[Tensor]:
                return [run_block(block, x, probe.context()) for x, probe in zip(before, probes, strict=True)]

            for name, one in solved.items():
                solutions = solve_block(block, groups, dict(collectors), one.settings)
                if name in tuners:
                    solutions, entry = tuners[name].tune(block, groups, solutions, stream, index)
                    one.kept += entry.kept
                one.solutions.append(solutions)
                if one.settings.recipe.solver.residual:
                    kept = input_gains(block, groups, solutions, one.settings.scheme, outputs, after)
                    for group, row in zip(groups, kept, strict=True):
                        measured = BlockGains(tuple(row["gains"]), row["rows"], row["sensitivity"])
                        closed = closed_form(stats[group.names], group.names, solutions, one.settings)
                        one.gains[index, group.names] = measured
                        one.closed[index, group.names] = replace(measured, gains=tuple(closed))
        return solved

    def error(self, solved: Solved, chosen: Chosen | None = None, *, wide: bool = False) -> float:
        """Held-out denoiser error of the expert with these residual blocks."""
        stream, scheme = self.other.start(), solved.settings.scheme
        for index, (block, solutions) in enumerate(zip(self.blocks, solved.solutions, strict=True)):
            of = {name: blocks for (at, names), blocks in (chosen or {}).items() if at == index for name in names}
            quantized = copy.deepcopy(block)
            with_blocks = {
                name: replace(one, residual=None if wide else of.get(name)) for name, one in solutions.items()
            }
            install(quantized, with_blocks, scheme)
            for name in of if wide else ():
                original = scheme.transform.weight(block.get_submodule(name).weight, solutions[name].basis)
                quantized.set_submodule(name, WideBlocks(quantized.get_submodule(name), original, of[name]))
            self._forward(quantized, stream)
        return self.other.output_error(self.reference, stream)


def choices(solved: Solved, shares: list[float], controls: bool) -> dict[str, tuple[Chosen, bool]]:
    """Name -> chosen blocks, and whether they are unquantized."""
    found = {f"residual {share:g}": (solved.choose(share, solved.gains.__getitem__), False) for share in shares}
    if not controls:
        return found
    share = shares[0]
    drawn = random.Random(0)
    random_gains = {
        key: BlockGains(tuple(drawn.random() * one.rows for _ in one.gains), one.rows)
        for key, one in solved.gains.items()
    }
    found[f"random {share:g}"] = (solved.choose(share, random_gains.__getitem__), False)
    found[f"even {share:g}"] = (solved.choose(share, lambda key: replace(solved.gains[key], sensitivity=1.0)), False)
    found[f"closed form {share:g}"] = (solved.choose(share, solved.closed.__getitem__), False)
    found[f"a budget a block {share:g}"] = (solved.by_block(share), False)
    third = share / (PRODUCT_OF_BF16 - 1)
    found[f"bf16 blocks for {share:g}"] = (solved.choose(third, solved.gains.__getitem__), True)
    return found


@torch.no_grad()
def main() -> None:
    parser = sweep_parser(__doc__)
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.03, 0.01, 0.1])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1])
    args = parser.parse_args()
    quiet_libraries()
    layout = resolve_model(args.model)
    own, other = record_both(args, layout)
    table: list[dict] = []
    experts = {name: Expert(layout, name, own, other) for name in layout.experts}
    for damping in args.dampings:
        first = damping == args.dampings[0]
        change = (f"solver.damping={damping}", f"solver.residual={args.shares[0]}")
        recipes = {name: (fmt, load_recipe(name, fmt, change)) for name, fmt in RECIPES.items()}
        if first:
            recipes |= {
                f"rtn, {get_format(fmt).title}": (fmt, load_recipe("rtn", fmt)) for fmt in set(RECIPES.values())
            }
        settings = {name: QuantizeSettings(fmt, recipe, name, {}) for name, (fmt, recipe) in recipes.items()}
        rows: dict[tuple[str, str], dict[str, float]] = {}
        for expert, one in experts.items():
            for name, solved in one.solve(settings).items():
                found: dict[str, tuple[Chosen | None, bool]] = {"none": (None, False)}
                found |= choices(solved, args.shares, first) if solved.gains else {}
                for choice, (chosen, wide) in found.items():
                    rows.setdefault((name, choice), {})[expert] = error = one.error(solved, chosen, wide=wide)
                    ui.info(f"damping {damping:g}, {expert}, {name}, {choice}: {error:.4e}")
        for (name, choice), errors in rows.items():
            mean = sum(errors.values()) / len(errors)
            table.append({"recipe": name, "damping": damping, "blocks": choice, "error": mean, **errors})
        base = {
            RECIPES.get(row["recipe"], row["recipe"]): row["error"] for row in table if row["recipe"].startswith("rtn")
        }
        for row in table:
            title = get_format(RECIPES[row["recipe"]]).title if row["recipe"] in RECIPES else ""
            row["ratio"] = row["error"] / base[f"rtn, {title}"] if title else 1.0
        write_json(args.out / f"residual-{args.model}.json", table)


if __name__ == "__main__":
    main()
