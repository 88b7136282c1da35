"""`--cache first-block[:threshold]`: a step whose first block changes little takes the rest of the last step's blocks again.

diffusers' first-block cache on each expert, with a state for each expert and branch. What is checked here needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ptq import ui
from ptq.errors import UsageError

FIRST_BLOCK = "first-block"
DEFAULT_THRESHOLD = 0.05
"""Of diffusers: a step is skipped where the first block's change differs from the last step's by less than this share."""
MIN_STEPS = 5
"""Distilled models with 4 steps have no two that are alike."""
FEW_STEPS = 12
"""Below this many the steps are so far apart that little is skipped, and what is skipped shows."""


def normal_cache(text: str | None) -> str | None:
    """What run.json says for what a user typed: always with its threshold, so that equal caches are equal texts.

    Raises:
        UsageError: another kind of cache, or a threshold that is no number in (0, 1].
    """
    if text is None:
        return None
    name, _, given = text.partition(":")
    try:
        threshold = float(given) if ":" in text else DEFAULT_THRESHOLD
    except ValueError:
        threshold = math.nan
    if name != FIRST_BLOCK or not 0.0 < threshold <= 1.0:
        raise UsageError(
            f"--cache takes {FIRST_BLOCK} or {FIRST_BLOCK}:THRESHOLD with a threshold above 0 and up to 1 (without: {DEFAULT_THRESHOLD}), found {ui.shorten(repr(text))}."
        )
    return f"{FIRST_BLOCK}:{threshold:g}"


def check_cache(cache: str | None, steps: int, context_parallel: int, blocks: int) -> None:
    """Refuse a cache where it cannot work, and warn where it hardly can.

    Args:
        cache: as `normal_cache` gives it. blocks: of the smallest expert.

    Raises:
        UsageError: too few steps or blocks, or a video that several processes make.
    """
    if cache is None:
        return
    if steps < MIN_STEPS:
        raise UsageError(
            f"--cache skips steps that are nearly those before, and with {steps} steps there are none: every one would be computed, or a needed one left out. Leave out --cache, or use at least {FEW_STEPS} steps."
        )
    if context_parallel > 1:
        raise UsageError(
            "--cache cannot be used with --context-parallel: each process sees its part of the video and would skip other steps than the rest. Leave out one of the two."
        )
    if blocks < 2:
        raise UsageError("--cache skips all blocks but the first, and this model has only one. Leave it out.")
    if steps < FEW_STEPS:
        ui.warn(
            f"--cache with {steps} steps: consecutive steps differ much below {FEW_STEPS}, so expect few skipped steps, and visible ones."
        )


def enable_cache(experts: Mapping[str, Any], cache: str | None) -> None:
    """Turn the cache of `normal_cache` on in every expert; before hooks of offloading are set, which have to stay outermost.

    diffusers takes a hook of group offloading out of the middle of a chain after the first call, and a cache's with it.
    """
    from diffusers import FirstBlockCacheConfig

    for expert in experts.values():
        if expert.is_cache_enabled:  # of an earlier run with this pipeline
            expert.disable_cache()
        if cache is not None:
            expert.enable_cache(FirstBlockCacheConfig(threshold=float(cache.partition(":")[2])))


def forget_cached(experts: Mapping[str, Any]) -> None:
    """Forget the last video's blocks: a call that failed has left them."""
    for expert in experts.values():
        if expert.is_cache_enabled:
            expert._reset_stateful_cache()
