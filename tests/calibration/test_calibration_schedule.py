"""Which steps are recorded: spread over every expert's range, moving from prompt to prompt, split as diffusers splits."""

import math

import pytest
from calibration_helpers import load, make_plan
from hypothesis import given
from hypothesis import strategies as st

from ptq.calibration.schedule import choose_steps, sampling_schedule
from ptq.errors import UsageError
from ptq.store.calibration import Step
from ptq.wan.pipeline import call_arguments


def schedule_of(*lengths: int) -> list[Step]:
    """A schedule whose expert i serves lengths[i] consecutive steps."""
    experts = [f"expert_{i}" for i, length in enumerate(lengths) for _ in range(length)]
    return [
        Step(index=index, timestep=1000.0 - index, sigma=0.5, d_sigma=0.01, expert=expert)
        for index, expert in enumerate(experts)
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=2), st.integers(1, 12), st.integers(0, 500))
def test_one_step_of_every_stratum(lengths, count, prompt):
    schedule = schedule_of(*lengths)
    if count == len(schedule):
        assert choose_steps(schedule, count, prompt) == schedule
        return
    shares = {0: count} if len(lengths) == 1 else {i: (count + (prompt + i + 1) % 2) // 2 for i in range(2)}
    if any(shares[i] > length for i, length in enumerate(lengths)):
        with pytest.raises(UsageError, match="serves only"):
            choose_steps(schedule, count, prompt)
        return
    chosen = choose_steps(schedule, count, prompt)
    assert len({step.index for step in chosen}) == len(chosen) == count
    for i, length in enumerate(lengths):
        own = [step.index for step in schedule if step.expert == f"expert_{i}"]
        picked = [own.index(step.index) for step in chosen if step.expert == f"expert_{i}"]
        strata = [int(position * shares[i] / length) for position in picked]
        edges = [math.ceil(s * length / shares[i]) for s in range(shares[i])]
        assert len(picked) == shares[i] and picked == sorted(picked)
        # Strata need not end on whole steps; a step that two of them share counts for either.
        assert all(
            s in (stratum, stratum - 1) and p + 1 >= edges[stratum]
            for stratum, (s, p) in enumerate(zip(strata, picked, strict=True))
        )


@pytest.mark.parametrize(("lengths", "count"), [((20,), 2), ((13, 27), 4), ((5, 35), 2), ((8, 8), 3)])
def test_prompts_together_cover_every_step_evenly(lengths, count):
    schedule = schedule_of(*lengths)
    prompts = 240
    seen = [step.index for prompt in range(prompts) for step in choose_steps(schedule, count, prompt)]
    for i, length in enumerate(lengths):
        own = [step.index for step in schedule if step.expert == f"expert_{i}"]
        expected = prompts * count / len(lengths) / length
        for index in own:
            assert 0.5 * expected <= seen.count(index) <= 1.5 * expected


def test_neighbouring_prompts_record_different_steps():
    schedule = schedule_of(12, 28)
    for prompt in range(50):
        first, second = (choose_steps(schedule, 4, p) for p in (prompt, prompt + 1))
        assert not {step.index for step in first} & {step.index for step in second}


def test_too_many_records_is_an_error_that_says_what_to_change():
    with pytest.raises(UsageError, match=r"6 steps of expert_0 .* serves only 5 of 20 .*--records-per-prompt"):
        choose_steps(schedule_of(5, 15), 12, 0)


@pytest.mark.parametrize("variant", ["T2V-A14B", "I2V-A14B", "TI2V-5B"])
def test_experts_and_noise_levels_are_those_of_the_pipeline(pipelines, variant, first_frame):
    pipe = load(str(pipelines[variant]))
    plan = make_plan(pipelines[variant], steps=12)
    schedule = sampling_schedule(pipe, 12)
    calls = []
    handles = [
        getattr(pipe, name).register_forward_pre_hook(
            lambda _m, _a, kw, name=name: calls.append((name, float(kw["timestep"].max()))), with_kwargs=True
        )
        for name in plan.layout.experts
    ]
    arguments = call_arguments(plan.preset, "a ball", 0, first_frame if variant == "I2V-A14B" else None)
    pipe(**arguments, output_type="latent")
    for handle in handles:
        handle.remove()
    assert [(step.expert, step.timestep) for step in schedule for _ in range(2)] == calls
    assert len({step.expert for step in schedule}) == len(plan.layout.experts)
    assert sum(step.d_sigma for step in schedule) == pytest.approx(schedule[0].sigma)
    assert all(step.timestep == pytest.approx(1000 * step.sigma, abs=1) for step in schedule)
