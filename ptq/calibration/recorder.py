"""Capturing what the denoiser is called with while the real pipeline runs.

Hooks on the experts see every call. Within a step the first call is the conditional branch and the second the
unconditional one; steps are counted by the pipeline's own end-of-step callback, not by the timestep, because UniPC rounds
timesteps to integers and many steps with a large shift give neighbours the same one. The run is interrupted after the
last wanted step: nothing later is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptq.store.calibration import Step
from ptq.store.records import BRANCHES, IMAGE, TEXT, Record
from ptq.wan.pipeline import experts_of


@dataclass
class Capture:
    """What one prompt's run yielded: record lines, the tensors of the prompt's file, and the negative embedding [L, D]."""

    records: list[Record] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    negative_embeds: Tensor | None = None


@torch.no_grad()
def record_prompt(
    pipeline: Any,
    call_arguments: dict[str, Any],
    steps: Sequence[Step],
    *,
    prompt_index: int,
    sample_id: str,
    file: str,
) -> Capture:
    """Run the pipeline on one prompt and keep the denoiser calls of the chosen steps.

    Args:
        pipeline: a Wan pipeline.
        call_arguments: keyword arguments of the pipeline call (prompt, size, steps, guidance, generator).
        steps: the steps to record.
        prompt_index, sample_id, file: identity written into the records.
    """
    capture = Capture()
    wanted = {step.index: step for step in steps}
    last = max(wanted)
    position = {"step": 0, "call": 0}

    def end_of_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        position.update(step=index + 1, call=0)
        if index >= last:
            pipe._interrupt = True
        return tensors

    def on_call(_module: torch.nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
        branch = BRANCHES[position["call"]]
        position["call"] += 1
        embeds = inputs["encoder_hidden_states"][0].detach().cpu()
        image = inputs.get("encoder_hidden_states_image")
        if branch == "cond":
            capture.tensors[TEXT] = embeds
        else:
            capture.negative_embeds = embeds
        if image is not None:
            capture.tensors[IMAGE] = image[0].detach().cpu()
        step = wanted.get(position["step"])
        if step is None:
            return
        name = f"{prompt_index:05d}-{step.index:03d}-{branch}"
        capture.tensors[f"{name}.hidden_states"] = inputs["hidden_states"][0].detach().cpu().clone()
        capture.tensors[f"{name}.timestep"] = inputs["timestep"].detach().cpu().clone()
        record = Record(
            record=name,
            file=file,
            sample_id=sample_id,
            expert=step.expert,
            step=step.index,
            timestep=step.timestep,
            sigma=step.sigma,
            d_sigma=step.d_sigma,
            branch=branch,
        )
        capture.records.append(record)

    with contextlib.ExitStack() as hooks:
        for expert in experts_of(pipeline).values():
            hooks.enter_context(expert.register_forward_pre_hook(on_call, with_kwargs=True))
        pipeline(**call_arguments, output_type="latent", callback_on_step_end=end_of_step)
    return capture
