"""What one quantize run is asked to do, and the block budget of the challenge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ptq.config import Recipe
from ptq.errors import UsageError
from ptq.runtime import QuantSpec

BUDGET = {"mxfp4": 5, "hif4": 2}
"""Transformer blocks that may stay in high precision (rules of the challenge)."""

BudgetScope = Literal["total", "per-expert"]


@dataclass(frozen=True)
class QuantizeSettings:
    """Resolved options of `ptq quantize`.

    Attributes:
        format: "mxfp4" or "hif4".
        recipe, recipe_name: how.
        high_precision: expert -> protected block -> why it is protected.
        auto_protect: choose the protected blocks by measurement, up to the budget.
        budget_scope: whether the budget counts over both experts (default) or each.
        seed: of token subsamples.
    """

    format: str
    recipe: Recipe
    recipe_name: str
    high_precision: Mapping[str, Mapping[int, str]]
    auto_protect: bool = False
    budget_scope: BudgetScope = "total"
    seed: int = 0

    @property
    def spec(self) -> QuantSpec:
        """The numerics of every quantized layer."""
        recipe = self.recipe
        learned = recipe.learned_transform
        return QuantSpec(
            format=self.format,
            rotation=recipe.rotation,
            smooth=bool(recipe.smoothing) and not learned,
            scale_rule=recipe.activations.scale_rule,
            ties=recipe.activations.ties,
            learned=learned,
        )


def parse_high_precision(text: str, num_blocks: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Parse --high-precision: "none", "auto" (nothing yet) or "transformer:0,transformer_2:39".

    Args:
        num_blocks: expert -> number of blocks.

    Raises:
        UsageError: unknown expert, block out of range, or not of this form.
    """
    chosen: dict[str, set[int]] = {expert: set() for expert in num_blocks}
    for item in [] if text in ("none", "auto") else text.split(","):
        match = re.fullmatch(r"\s*(\w+):(\d+)\s*", item)
        if match is None or match[1] not in num_blocks:
            raise UsageError(
                f"--high-precision takes none, auto or a list like transformer:0,transformer_2:39; found {item!r}. Experts of this model: {', '.join(num_blocks)}."
            )
        if int(match[2]) >= num_blocks[match[1]]:
            raise UsageError(f"{match[1]} has blocks 0 to {num_blocks[match[1]] - 1}; found {item.strip()}.")
        chosen[match[1]].add(int(match[2]))
    return {expert: dict.fromkeys(sorted(blocks), "named by --high-precision") for expert, blocks in chosen.items()}


def check_budget(format_name: str, high_precision: Mapping[str, Mapping[int, str]], scope: str) -> None:
    """Refuse more protected blocks than the challenge allows.

    Raises:
        UsageError: over the budget; says how many and how they are counted.
    """
    limit = BUDGET[format_name]
    counts = {expert: len(blocks) for expert, blocks in high_precision.items()}
    worst = sum(counts.values()) if scope == "total" else max(counts.values(), default=0)
    if worst > limit:
        raise UsageError(
            f"{worst} blocks would stay in high precision, counted {scope.replace('-', ' ')}; {format_name} allows at most {limit}. Name fewer blocks in --high-precision."
            + (" Counting per expert is possible with --budget-scope per-expert." if scope == "total" else "")
        )
