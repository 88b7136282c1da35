"""Errors on held-out records, for the scripts beside this one: of a packed checkpoint, and of many recipes at once.

A sweep gathers the statistics of a block once and solves them for every recipe.
Each recipe has its own stream of held-out hidden states, moved on through its own quantized blocks, so the figure at the
end is the held-out denoiser error that a full run of that recipe would have.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ptq import ui
from ptq.checkpoint.shards import ShardSet
from ptq.errors import UsageError
from ptq.quantization.block import collect_statistics, find_and_collect, forward_stream, install, solve_block
from ptq.quantization.calls import ExpertCalls
from ptq.quantization.hybrid import HybridExpert
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.shared_inputs import InputGroup
from ptq.store.calibration import CalibrationSet
from ptq.wan.layout import ModelLayout
from ptq.wan.replay import ExpertReplay


@dataclass
class SweepRow:
    """One recipe's result: squared relative denoiser error of each expert on held-out records, mean layer errors."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    layer_error: float = 0.0
    layer_error_rtn: float = 0.0
    seconds: float = 0.0

    @property
    def error(self) -> float:
        """Mean over the experts."""
        return sum(self.errors.values()) / len(self.errors)


def sweep(
    layout: ModelLayout,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    variants: Mapping[str, QuantizeSettings],
) -> list[SweepRow]:
    """Held-out denoiser error of every variant.

    Args:
        layout: the original model.
        calibration: records that the statistics come from.
        held_out: records of other prompts, on which errors are measured.
        variants: name -> settings; all with one `records` group.

    Raises:
        UsageError: the variants cannot share statistics, or ask for what a sweep does not do, or the two sets share a prompt.
    """
    _check(calibration, held_out, variants)
    rows = {name: SweepRow(name) for name in variants}
    counts: list[tuple[str, dict]] = []
    with ui.progress("Sweep", sum(layout.num_blocks(e) for e in layout.experts) * len(variants)) as bar:
        for expert, config in layout.experts.items():
            replay = ExpertReplay(ShardSet(layout.path / expert), config)
            targets = list(layout.linear_shapes(expert))
            counts += _sweep_expert(expert, targets, replay, calibration, held_out, variants, rows, bar)
    for name, row in rows.items():
        own = [stats for variant, stats in counts if variant == name]
        row.layer_error = sum(s["output_error"] for s in own) / len(own)
        row.layer_error_rtn = sum(s["output_error_rtn"] for s in own) / len(own)
    return list(rows.values())


def _check(calibration: CalibrationSet, held_out: CalibrationSet, variants: Mapping[str, QuantizeSettings]) -> None:
    if len({settings.recipe.records for settings in variants.values()}) != 1:
        raise UsageError("Recipes of one sweep must have equal `records` keys.")
    beyond = [name for name, one in variants.items() if one.recipe.solver.tune or one.recipe.solver.residual]
    if beyond:
        raise UsageError(
            f"A sweep solves blocks, and neither tunes them nor chooses residual blocks, which {', '.join(beyond)} asks for: see tuning_table.py and residual_table.py."
        )
    shared = {s.caption_digest for s in calibration.info.samples} & {s.caption_digest for s in held_out.info.samples}
    if shared:
        raise UsageError(f"{len(shared)} prompts are in both record sets; held-out records must be of other prompts.")


def _sweep_expert(
    expert: str,
    targets: list[str],
    replay: ExpertReplay,
    calibration: CalibrationSet,
    held_out: CalibrationSet,
    variants: Mapping[str, QuantizeSettings],
    rows: Mapping[str, SweepRow],
    bar: ui.Progress,
) -> list[tuple[str, dict]]:
    some = next(iter(variants.values()))
    solver = some.recipe.solver.model_copy(update={"rounding": "gptq"})  # gather Hessians for everyone
    full = replace(some, recipe=some.recipe.model_copy(update={"solver": solver}))
    own, other = (ExpertCalls(expert, replay, records) for records in (calibration, held_out))
    stream, reference = own.start(), other.start()
    streams = {name: other.start() for name in variants}
    statistics: list[tuple[str, dict]] = []
    groups: list[InputGroup] = []
    for index in range(replay.num_blocks):
        block = replay.load_block(index)
        replayed = (own.batches, stream, full, replay.device)
        if groups:
            collectors = collect_statistics(block, groups, *replayed)
        else:
            groups, collectors = find_and_collect(block, targets, *replayed)
        forward_stream(block, other.batches, reference, reference, replay.device)
        for name, settings in variants.items():
            start = time.monotonic()
            solutions = solve_block(block, groups, dict(collectors), settings)
            rows[name].seconds += time.monotonic() - start
            quantized = copy.deepcopy(block)
            install(quantized, solutions, settings.scheme)
            forward_stream(quantized, other.batches, streams[name], streams[name], replay.device)
            statistics += [(name, solution.stats) for solution in solutions.values()]
            bar.advance(note=f"{expert} block {index}, {name}")
    for name, candidate in streams.items():
        rows[name].errors[expert] = other.output_error(reference, candidate)
    return statistics


def denoiser_errors(
    original: ModelLayout, packed: ModelLayout, records: CalibrationSet, device: str = "cpu"
) -> dict[str, float]:
    """Relative squared output error of each expert, and their mean under "mean".

    Args:
        original, packed: the model and its quantized checkpoint.
        records: made from `original`; use prompts that calibration did not see.

    Raises:
        UsageError: the two are not of one structure.
    """
    if list(original.experts) != list(packed.experts):
        raise UsageError(f"{original.path} and {packed.path} have different experts and cannot be compared.")
    errors = {}
    for expert in original.experts:
        replays = [
            ExpertReplay(ShardSet(layout.path / expert), layout.experts[expert], device)
            for layout in (original, packed)
        ]
        hybrid = HybridExpert(expert, replays[0], replays[1], records)
        errors[expert] = hybrid.error([True] * hybrid.num_blocks)
    errors["mean"] = sum(errors.values()) / len(errors)
    return errors
