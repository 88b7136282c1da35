"""How a Wan pipeline is called: its schedule's shift, and the keyword arguments of the call that recording makes.

Generation passes its own latents and callbacks and has its own call (`ptq.generation.sampling`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ptq.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from ptq.config import ModelPreset


def call_arguments(preset: ModelPreset, prompt: str, seed: int, image: np.ndarray | None = None) -> dict[str, Any]:
    """Arguments for WanPipeline / WanImageToVideoPipeline.

    Args:
        preset: sizes, steps and guidance, overrides already applied.
        prompt: text for the text encoder.
        seed: of the CPU generator that draws the initial latent.
        image: first frame, uint8 [H, W, 3] of the preset's size, for image-to-video.
    """
    import torch

    arguments: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": preset.negative_prompt,
        "height": preset.height,
        "width": preset.width,
        "num_frames": preset.num_frames,
        "num_inference_steps": preset.steps,
        "guidance_scale": preset.guidance_scale,
        "max_sequence_length": preset.max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(seed),
    }
    if preset.guidance_scale_2 is not None:
        arguments["guidance_scale_2"] = preset.guidance_scale_2
    if image is not None:
        from PIL import Image

        arguments["image"] = Image.fromarray(image)
    return arguments


def set_flow_shift(pipe: Any, flow_shift: float) -> None:
    """Give the pipeline a scheduler with this shift.

    Raises:
        UsageError: the scheduler has no such parameter.
    """
    config = pipe.scheduler.config
    key = next((key for key in ("flow_shift", "shift") if key in config), None)
    if key is None:
        raise UsageError(f"The scheduler {type(pipe.scheduler).__name__} has no flow shift; use a flow-matching one.")
    pipe.scheduler = type(pipe.scheduler).from_config(config, **{key: flow_shift})
