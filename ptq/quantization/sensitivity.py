"""Which few blocks stay in high precision: measured on the denoiser's output, not guessed from position.

Every choice is judged by one number: the d_sigma^2-weighted squared error of the predicted velocity over both experts,
relative to the original's output. `quantize_one` tells how much each block contributes; the choice itself is greedy from
the fully quantized model, measured again after every pick, because errors of blocks do not simply add up.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ptq import ui
from ptq.checkpoint.shards import ShardSet
from ptq.quantization.hybrid import HybridExpert
from ptq.quantization.job import Job
from ptq.quantization.settings import QuantizeSettings
from ptq.quantization.workdir import WorkDir
from ptq.rules import block_budget
from ptq.store.files import read_json
from ptq.store.sensitivity import (
    PROTECTION_FILE,
    BlockError,
    Pick,
    SensitivityTable,
    read_protection,
    write_protection,
    write_sensitivity,
)
from ptq.wan.replay import ExpertReplay

RANDOM_DRAWS = 16

Choice = tuple[str, int]


class Sensitivity:
    """Errors of a model whose blocks are quantized or original, over all its experts.

    Args:
        experts: one hybrid for each expert.
        importance: expert -> how much of the final latent's error it makes: steps x mean d_sigma^2 x output energy.
    """

    def __init__(self, experts: Mapping[str, HybridExpert], importance: Mapping[str, float]) -> None:
        self.experts = experts
        total = sum(importance.values())
        self._share = {name: value / total for name, value in importance.items()}
        self._cache: dict[tuple[str, tuple[bool, ...]], float] = {}

    def quantize_one(self) -> dict[Choice, float]:
        """Error with only this block quantized, for every block."""
        result = {}
        total = sum(hybrid.num_blocks for hybrid in self.experts.values())
        with ui.progress("Sensitivity, one block quantized", total) as bar:
            for name, hybrid in self.experts.items():
                blocks = range(hybrid.num_blocks)
                errors = hybrid.flip_errors([False] * hybrid.num_blocks, blocks, bar)
                result.update({(name, block): self._share[name] * errors[block] for block in blocks})
        return result

    def error(self, protected: Sequence[Choice]) -> float:
        """Error of the model with these blocks original and all others quantized."""
        return sum(self._share[name] * self._expert_error(name, self._flags(name, protected)) for name in self.experts)

    def greedy(self, budget: int, scope: str) -> list[Pick]:
        """Protect the block that helps most, measure again, and so on; stops at the budget or when nothing helps.

        Args:
            budget: how many blocks, over all experts ("total") or of each ("per-expert").
        """
        picks: list[Pick] = []
        while True:
            chosen = [(pick.expert, pick.block) for pick in picks]
            counts = Counter(expert for expert, _ in chosen)
            full = {name for name, hybrid in self.experts.items() if counts[name] >= min(budget, hybrid.num_blocks)}
            if (scope == "total" and len(picks) >= budget) or len(full) == len(self.experts):
                return picks
            before = self.error(chosen)
            gains = self._gains(chosen, full, f"Greedy choice {len(picks) + 1}")
            (expert, block), after = min(gains.items(), key=lambda item: item[1])
            if after >= before:
                return picks
            picks.append(Pick(expert=expert, block=block, before=before, after=after))

    def _gains(self, chosen: list[Choice], full: set[str], title: str) -> dict[Choice, float]:
        current = {name: self._expert_error(name, self._flags(name, chosen)) for name in self.experts}
        open_experts = [name for name in self.experts if name not in full]
        candidates = {
            name: [b for b in range(self.experts[name].num_blocks) if (name, b) not in chosen] for name in open_experts
        }
        gains = {}
        with ui.progress(title, sum(map(len, candidates.values()))) as bar:
            for name, blocks in candidates.items():
                rest = sum(self._share[other] * current[other] for other in self.experts if other != name)
                errors = self.experts[name].flip_errors(self._flags(name, chosen), blocks, bar)
                gains.update({(name, b): rest + self._share[name] * e for b, e in zip(blocks, errors, strict=True)})
        return gains

    def _flags(self, expert: str, protected: Sequence[Choice]) -> tuple[bool, ...]:
        return tuple((expert, block) not in protected for block in range(self.experts[expert].num_blocks))

    def _expert_error(self, expert: str, flags: tuple[bool, ...]) -> float:
        if (expert, flags) not in self._cache:
            self._cache[expert, flags] = self.experts[expert].error(flags)
        return self._cache[expert, flags]

    def priors(self, budget: int) -> dict[str, list[list[Choice]]]:
        """The fixed choices that others make, cut to the budget, and random ones: name -> drawn choices."""
        names = list(self.experts)
        length = min(hybrid.num_blocks for hybrid in self.experts.values())
        every = [(name, block) for name, hybrid in self.experts.items() for block in range(hybrid.num_blocks)]
        first = [(name, block) for block in range(length) for name in names]
        ends = [(name, b) for i in range(length // 2) for b in (i, length - 1 - i) for name in names]
        generator = random.Random(0)
        return {
            "first blocks": [first[:budget]],
            "first and last blocks": [ends[:budget]],
            f"random (mean of {RANDOM_DRAWS})": [generator.sample(every, budget) for _ in range(RANDOM_DRAWS)],
        }


def build_sensitivity(job: Job, packed: Mapping[str, ShardSet], packed_configs: Mapping[str, dict]) -> Sensitivity:
    """Hybrids of every expert from original and packed weights, with the experts' shares of the final error."""
    hybrids, importance = {}, {}
    schedule = job.calibration.info.schedule
    for name, config in job.layout.experts.items():
        original = ExpertReplay(job.shards[name], config, job.options.device)
        quantized = ExpertReplay(packed[name], packed_configs[name], job.options.device)
        hybrids[name] = HybridExpert(name, original, quantized, job.calibration)
        d_sigmas = [step.d_sigma for step in schedule if step.expert == name]
        records = len(job.calibration.of_expert(name))
        importance[name] = sum(d**2 for d in d_sigmas) * hybrids[name].signal / records
    return Sensitivity(hybrids, importance)


def protect_blocks(job: Job, work: WorkDir) -> None:
    """Measure, choose up to the budget, and save the choice, the table and the heatmap's data in the work directory.

    The fully quantized experts must lie in the work directory. A choice made before an interruption is kept.
    """
    if not (work.path / PROTECTION_FILE).exists():
        packed = {name: ShardSet(work.path / name) for name in job.layout.experts}
        configs = {name: read_json(work.path / name / "config.json") for name in job.layout.experts}
        measured = build_sensitivity(job, packed, configs)
        budget = block_budget(job.settings.format)
        assert budget is not None  # `QuantizeSettings` refuses auto_protect without one
        picks = measured.greedy(budget, job.settings.budget_scope)
        write_sensitivity(work.path, sensitivity_table(measured, picks, budget))
        write_protection(work.path, picks)


def with_protection(settings: QuantizeSettings, work: WorkDir, experts: Sequence[str]) -> QuantizeSettings:
    """The settings with the blocks that `protect_blocks` chose, and why each was chosen."""
    chosen: dict[str, dict[int, str]] = {name: {} for name in experts}
    for number, pick in enumerate(read_protection(work.path), 1):
        reason = f"greedy choice {number}: denoiser error {pick.before:.3e} -> {pick.after:.3e}"
        chosen[pick.expert][pick.block] = reason
    return replace(settings, high_precision=chosen, auto_protect=False)


def sensitivity_table(measured: Sensitivity, picks: Sequence[Pick], budget: int) -> SensitivityTable:
    """The table: each block's own error, the picks, and what other choices under the same budget would give."""
    chosen = [(pick.expert, pick.block) for pick in picks]
    comparison = {"none": measured.error([]), "auto": measured.error(chosen)}
    for name, draws in measured.priors(len(chosen) or budget).items():
        comparison[name] = sum(measured.error(draw) for draw in draws) / len(draws)
    one = measured.quantize_one()
    return SensitivityTable(
        metric="squared denoiser-output error relative to the original, weighted by d_sigma^2, over all experts",
        quantize_one=[BlockError(expert=e, block=b, error=error) for (e, b), error in one.items()],
        picks=list(picks),
        comparison=comparison,
    )
