"""The rules of the challenge: how many blocks of a format may stay in high precision, and what it may lose.

Everything that asks for a budget or a limit asks here. A format that the challenge does not know has neither: it can be
quantized, measured and compared, and gets no verdict.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ptq.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """blocks: transformer blocks that may stay in high precision. loss: highest accepted mean loss, as a fraction."""

    blocks: int
    loss: float


RULES: Mapping[str, Rule] = {"hif4": Rule(blocks=2, loss=0.005), "mxfp4": Rule(blocks=5, loss=0.01)}
"""Name of a format -> its rule."""

GATE = "mean_signed"
"""The average over the dimensions that decides; a key of `ptq.evaluation.statistics.AGGREGATES`."""
RESAMPLES, MIN_RESAMPLES = 10_000, 1000
"""Bootstrap resamples of an interval: what is taken, and the fewest that 95 % intervals need."""
BUDGET_SCOPE = "total"
"""How a submission counts its protected blocks: over all experts. Per expert is for experiments."""
SUITE = "icme2026"
"""The suite of the challenge; what any other says is a rehearsal."""

LIMITS_IN_WORDS = " or ".join(f"{name} (limit {100 * rule.loss:g} %)" for name, rule in RULES.items())
"""For messages and help texts."""


def block_budget(format_name: str) -> int | None:
    """How many blocks may stay in high precision; None for a format that the challenge does not know."""
    return RULES[format_name].blocks if format_name in RULES else None


def loss_limit(format_name: str) -> float | None:
    """Highest accepted mean loss, as a fraction; None for a format that the challenge does not know."""
    return RULES[format_name].loss if format_name in RULES else None


def check_budget(format_name: str, high_precision: Mapping[str, Collection[object]], scope: str) -> None:
    """Refuse more protected blocks than the challenge allows.

    Args:
        high_precision: expert -> its protected blocks.
        scope: "total" counts over all experts, "per-expert" each by itself.

    Raises:
        UsageError: over the budget; says how many and how they are counted.
    """
    limit = block_budget(format_name)
    counts = {expert: len(blocks) for expert, blocks in high_precision.items()}
    worst = sum(counts.values()) if scope == "total" else max(counts.values(), default=0)
    if limit is not None and worst > limit:
        advice = " Counting per expert is possible with --budget-scope per-expert." if scope == "total" else ""
        raise UsageError(
            f"{worst} blocks would stay in high precision, counted {scope.replace('-', ' ')}; {format_name} allows at most {limit}. Name fewer blocks in --high-precision.{advice}"
        )
