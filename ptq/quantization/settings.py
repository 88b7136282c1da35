"""What one quantize run is asked to do."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ptq.config import Recipe
from ptq.config.fit import check_fit
from ptq.errors import UsageError
from ptq.rules import block_budget

if TYPE_CHECKING:
    from ptq.scheme import Scheme

BudgetScope = Literal["total", "per-expert"]


@dataclass(frozen=True)
class QuantizeSettings:
    """Resolved options of `ptq quantize`.

    Attributes:
        format: name of a registered format.
        recipe, recipe_name: how.
        high_precision: expert -> protected block -> why it is protected.
        auto_protect: choose the protected blocks by measurement, up to the budget.
        budget_scope: whether the budget counts over both experts (default) or each.
        seed: of token subsamples.

    Raises:
        UsageError: the recipe's names do not fit together, or blocks are to be chosen without a rule of how many.
    """

    format: str
    recipe: Recipe
    recipe_name: str
    high_precision: Mapping[str, Mapping[int, str]]
    auto_protect: bool = False
    budget_scope: BudgetScope = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fit(self.recipe, self.recipe_name, self.format)
        if self.auto_protect and block_budget(self.format) is None:
            raise UsageError(
                f"--high-precision auto chooses as many blocks as the challenge allows, and it has no rule for {self.format}. Name the blocks, or none."
            )

    @functools.cached_property
    def scheme(self) -> Scheme:
        """How every quantized layer is quantized."""
        from ptq.scheme import Scheme  # brings torch

        return Scheme.of(self.format, **self.recipe.scheme.model_dump())

    @property
    def needs_records(self) -> bool:
        """Whether the codes or what is chosen beside them depend on calibration records."""
        return self.recipe.solver.needs_records or self.scheme.transform.needs_records

    @property
    def needs_hessian(self) -> bool:
        """Whether any ingredient reads the Hessians of the inputs."""
        return self.recipe.solver.needs_hessian or self.scheme.transform.needs_hessian

    @property
    def record_limit(self) -> int | None:
        """How many records of each expert are replayed; None: all."""
        return None if self.needs_records else self.recipe.records.for_report


def parse_scope(text: str) -> BudgetScope:
    """Parse --budget-scope.

    Raises:
        UsageError: neither of the two.
    """
    for scope in get_args(BudgetScope):
        if text == scope:
            return scope
    raise UsageError(f"--budget-scope takes total or per-expert, found {text!r}.")


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
