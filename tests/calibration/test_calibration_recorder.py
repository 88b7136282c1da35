"""A record replayed through the real transformer gives, bit for bit, the output the pipeline saw at that call."""

import pytest
import torch
from calibration_helpers import load, make_plan
from diffusers import UniPCMultistepScheduler
from PIL import Image

from ptq.calibration.recorder import record_prompt
from ptq.calibration.run import calibrate
from ptq.calibration.schedule import choose_steps, sampling_schedule
from ptq.store.calibration import CalibrationSet
from ptq.wan.pipeline import call_arguments

VARIANTS = ("T2V-A14B", "I2V-A14B", "TI2V-5B")


def watch_outputs(pipe, experts):
    """Collects (expert, output) of every call."""
    calls = []
    handles = [
        getattr(pipe, name).register_forward_hook(lambda _m, _a, out, name=name: calls.append((name, out[0].clone())))
        for name in experts
    ]
    return calls, handles


@pytest.mark.parametrize("variant", VARIANTS)
def test_records_replay_to_the_outputs_that_the_pipeline_saw(pipelines, variant, image_file, tmp_path):
    pipe = load(str(pipelines[variant]))
    plan = make_plan(pipelines[variant], 1, records=8, image=image_file if variant == "I2V-A14B" else None)
    schedule = sampling_schedule(pipe, plan.preset.steps)
    steps = choose_steps(schedule, plan.steps_per_prompt, 0)
    calls, handles = watch_outputs(pipe, plan.layout.experts)
    calibrate(plan, lambda: pipe, tmp_path / "records")
    for handle in handles:
        handle.remove()
    # The run stops after the last wanted step, cond first and uncond second in each.
    seen = [(expert, branch, output) for (expert, output), branch in zip(calls, ["cond", "uncond"] * 99, strict=False)]
    assert len(seen) == 2 * (max(step.index for step in steps) + 1)

    records = CalibrationSet(tmp_path / "records")
    assert [(r.step, r.branch) for r in records] == [(s.index, b) for s in steps for b in ("cond", "uncond")]
    assert {r.expert for r in records} == set(plan.layout.experts)
    for record in records:
        expert, branch, output = seen[2 * record.step + (record.branch == "uncond")]
        assert (record.expert, record.branch) == (expert, branch)
        call = records.load(record)
        with torch.no_grad():
            again = getattr(pipe, expert)(
                hidden_states=call.hidden_states,
                timestep=call.timestep,
                encoder_hidden_states=call.encoder_hidden_states,
                return_dict=False,
            )[0]
        assert torch.equal(again, output)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_branches_carry_the_right_text(pipelines, variant, image_file, tmp_path):
    pipe = load(str(pipelines[variant]))
    plan = make_plan(pipelines[variant], 1, image=image_file if variant == "I2V-A14B" else None)
    calibrate(plan, lambda: pipe, tmp_path / "records")
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(
            plan.samples[0].prompt, plan.preset.negative_prompt, max_sequence_length=plan.preset.max_sequence_length
        )
    records = CalibrationSet(tmp_path / "records")
    for record in records:
        text = records.load(record).encoder_hidden_states
        assert torch.equal(text, positive if record.branch == "cond" else negative)
        assert records.tokens(record) == (text.shape[1], 0)
        assert records.shape(record) == tuple(records.load(record).hidden_states.shape[1:])


def test_steps_that_share_an_integer_timestep_are_told_apart(t2v):
    pipe = load(str(t2v))
    original = pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler.from_config(original.config, flow_shift=12.0)
    plan = make_plan(t2v, 1, steps=150)
    schedule = sampling_schedule(pipe, 150)[:8]
    assert len({step.timestep for step in schedule}) < len(schedule)
    calls, handles = watch_outputs(pipe, plan.layout.experts)
    capture = record_prompt(
        pipe,
        call_arguments(plan.preset, "a ball", 0),
        schedule,
        prompt_index=0,
        sample_id="p",
        file="records/00000.safetensors",
    )
    for handle in handles:
        handle.remove()
    pipe.scheduler = original
    assert [(r.step, r.branch) for r in capture.records] == [(i, b) for i in range(8) for b in ("cond", "uncond")]
    latents = [capture.tensors[f"{r.record}.hidden_states"] for r in capture.records]
    assert all(torch.equal(cond, uncond) for cond, uncond in zip(latents[::2], latents[1::2], strict=True))
    assert not torch.equal(latents[0], latents[2])
    assert len(calls) == 16


def test_image_to_video_records_what_its_image_shows(pipelines, image_file, tmp_path):
    pipe = load(str(pipelines["I2V-A14B"]))
    other = tmp_path / "other.png"
    Image.new("RGB", (32, 32), (250, 10, 10)).save(other)
    hidden = []
    for name, image in (("a", image_file), ("b", other)):
        calibrate(make_plan(pipelines["I2V-A14B"], 1, image=image), lambda: pipe, tmp_path / name)
        records = CalibrationSet(tmp_path / name)
        hidden.append(records.load(records.records[0]).hidden_states)
    assert torch.equal(hidden[0][:, 16:20], hidden[1][:, 16:20])  # mask
    assert not torch.equal(hidden[0][:, 20:], hidden[1][:, 20:])  # image latents
