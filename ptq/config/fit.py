"""Whether the names that a recipe uses exist and fit together, for one format; needs no torch."""

from __future__ import annotations

from ptq.config.recipe import Recipe
from ptq.errors import FormatError, UsageError
from ptq.known import RESIDUAL_BLOCK, check_rule, find_format, find_transform


def check_fit(recipe: Recipe, name: str, format_name: str) -> None:
    """Refuse a recipe whose names do not fit together.

    Args:
        name: of the recipe, for messages.

    Raises:
        UsageError: an unknown transform, blocks or scale rules that the format does not take, a search, exponents of
            smoothing or residual blocks where there are none.
    """
    scheme, solver = recipe.scheme, recipe.solver
    try:
        fmt, transform = find_format(format_name), find_transform(scheme.transform)
        transform.check(scheme.block, fmt.group_size)
        check_rule(format_name, fmt.scale_rules, scheme.input_rule or fmt.scale_rules[0])
    except FormatError as error:
        raise UsageError(f"Recipe {name}: {error}") from error
    if solver.clip_search and fmt.searched_scales is None:
        raise UsageError(f"Recipe {name}: {fmt.title} has no search of weight scales: set solver.clip_search to false.")
    rule = solver.weight_rule
    if rule is not None and rule not in fmt.scale_rules:
        raise UsageError(
            f"Recipe {name}: {fmt.title} has no scale rule {rule!r} for solver.weight_rule; choose one of {', '.join(fmt.scale_rules)}."
        )
    if solver.residual and RESIDUAL_BLOCK % fmt.group_size:
        raise UsageError(
            f"Recipe {name}: residual blocks have {RESIDUAL_BLOCK} channels, which are no whole groups of the {fmt.group_size} of {fmt.title}. Leave solver.residual at 0."
        )
    if solver.smoothing and not transform.smooths:
        raise UsageError(
            f"Recipe {name}: the transform {scheme.transform} does not try exponents of smoothing; leave solver.smoothing empty, or set scheme.transform to smoothed or learned."
        )
    if transform.needs_exponents and not solver.smoothing:
        raise UsageError(
            f"Recipe {name}: the transform {scheme.transform} has no exponents to try; name some, for example --set solver.smoothing=[0.5]."
        )
