"""Which denoising steps are recorded: stratified over each expert's own range, different from prompt to prompt.

Recording the first N calls, as is common, sees only the first steps of the first prompt. Here each expert's steps are
cut into equal strata, one step is taken from each, and the position inside the strata moves from prompt to prompt by
the golden ratio, so that any number of prompts covers all steps evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptq.errors import UsageError
from ptq.store.calibration import Step
from ptq.wan.pipeline import expert_at

GOLDEN = 0.6180339887498949
"""Golden ratio: the step of the positions inside the strata from prompt to prompt."""


def sampling_schedule(pipeline: Any, steps: int) -> list[Step]:
    """The sampler's steps and the expert that serves each of them; the pipeline's scheduler is set to `steps`."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    return [
        Step(
            index=index,
            timestep=timestep,
            sigma=sigmas[index],
            d_sigma=abs(sigmas[index] - sigmas[index + 1]),
            expert=expert_at(pipeline, timestep),
        )
        for index, timestep in enumerate(float(t) for t in scheduler.timesteps)
    ]


def choose_steps(schedule: Sequence[Step], count: int, prompt_index: int) -> list[Step]:
    """The steps recorded for one prompt.

    Args:
        schedule: all steps.
        count: how many steps to choose; they are shared evenly between the experts, the odd one alternating. As many as there are: all.
        prompt_index: position of the prompt in the calibration set.

    Raises:
        UsageError: an expert has fewer steps than asked for.
    """
    if count == len(schedule):
        return list(schedule)
    experts = list(dict.fromkeys(step.expert for step in schedule))
    chosen: list[Step] = []
    for position, expert in enumerate(experts):
        own = [step for step in schedule if step.expert == expert]
        share = count // len(experts) + ((prompt_index + position) % len(experts) < count % len(experts))
        if share > len(own):
            raise UsageError(
                f"{share} steps of {expert} should be recorded for each prompt, but it serves only {len(own)} of {len(schedule)} sampling steps. Lower --records-per-prompt or raise --steps."
            )
        phase = ((prompt_index + 1) * GOLDEN + position * 0.5) % 1.0
        chosen += [own[int((stratum + phase) * len(own) / share)] for stratum in range(share)]
    return chosen
