"""A diffusers Wan pipeline in use: its experts, how it is called, what its latents are, where its weights are.

Recording calls it through `call_arguments`; generation passes its own latents and callbacks (`ptq.generation.sampling`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ptq.errors import UsageError
from ptq.wan.block import check_size
from ptq.wan.variants import EXPERTS

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ptq.wan.presets import ModelPreset

OFFLOAD_MODES = ("none", "model", "group", "sequential")
"""--offload; see `place_pipeline`."""


def experts_of(pipe: Any) -> dict[str, Any]:
    """Name -> module of the pipeline's experts, high noise first."""
    return {name: module for name in EXPERTS if (module := getattr(pipe, name, None)) is not None}


def expert_at(pipe: Any, timestep: float) -> str:
    """Name of the expert that serves a timestep: with two, the first at and above the boundary, the second below."""
    boundary, experts = pipe.config.boundary_ratio, list(experts_of(pipe))
    high_noise = boundary is None or timestep >= boundary * pipe.scheduler.config.num_train_timesteps
    return experts[0] if high_noise else experts[-1]


def takes_image(pipe: Any) -> bool:
    """Whether the pipeline starts from a picture."""
    return "image" in inspect.signature(pipe.__call__).parameters


def with_image_input(pipe: Any) -> Any:
    """A pipeline that starts from an image: TI2V-5B directories name WanPipeline, but the same modules make an
    image-to-video pipeline. Other pipelines come back as they are."""
    if takes_image(pipe) or not pipe.config.expand_timesteps:
        return pipe
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**pipe.components, boundary_ratio=pipe.config.boundary_ratio, expand_timesteps=True)


def call_arguments(
    preset: ModelPreset,
    prompt: str,
    seed: int,
    image: np.ndarray | None = None,
    embeds: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Arguments for WanPipeline / WanImageToVideoPipeline.

    Args:
        preset: sizes, steps and guidance, overrides already applied.
        prompt: text for the text encoder.
        seed: of the CPU generator that draws the initial latent.
        image: first frame, uint8 [H, W, 3] of the preset's size, for image-to-video.
        embeds: arguments in place of the texts, for a pipeline without text encoder (`ptq.wan.encoding`).
    """
    import torch

    arguments: dict[str, Any] = {
        **(embeds or {"prompt": prompt, "negative_prompt": preset.negative_prompt}),
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
    return arguments | image_argument(image)


def image_argument(image: np.ndarray | None) -> dict[str, Any]:
    """The first frame, uint8 [H, W, 3], as the pipeline's call takes it; nothing without one."""
    if image is None:
        return {}
    from PIL import Image

    return {"image": Image.fromarray(image)}


def on_execution_device(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with their tensors where the pipeline computes: it moves embeddings nowhere."""
    import torch

    device = pipe._execution_device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


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


def latent_shape(pipe: Any, height: int, width: int, num_frames: int) -> tuple[int, int, int, int, int]:
    """Shape [1, C, T, H, W] of a video's latents.

    Raises:
        UsageError: the model cannot make that size or number of frames; names the nearest that it can.
    """
    stride, period = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    patch = next(iter(experts_of(pipe).values())).config.patch_size
    check_size(height, width, num_frames, stride, period, patch)
    return (1, pipe.vae.config.z_dim, (num_frames - 1) // period + 1, height // stride, width // stride)


def decode_latents(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Final latents [1, C, T, H, W] to a video [1, 3, T, H, W], as the end of diffusers' WanPipeline.__call__ does."""
    import torch

    vae = pipe.vae
    latents = latents.to(pipe._execution_device, dtype=vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
    with torch.no_grad():
        return vae.decode(latents / inverse_std + mean, return_dict=False)[0]


def video_pixels(pipe: Any, video: torch.Tensor) -> np.ndarray:
    """A decoded video [1, 3, T, H, W] to uint8 [T, H, W, 3] RGB; the pipeline's offloading hooks are done after it."""
    import torch

    pixels = pipe.video_processor.postprocess_video(video, output_type="pt")[0]
    pipe.maybe_free_model_hooks()
    return (pixels.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def place_pipeline(pipe: Any, device: str, offload: str = "none") -> Any:
    """Put a pipeline that lies on the CPU where it is to compute; returns it.

    Args:
        device: "cpu", "cuda" or "cuda:<n>".
        offload: none: every weight on the device. model: one component at a time. group: one block of an expert at a time,
            the next one on its way; what is no expert stays on the device. sequential: one layer at a time.

    Raises:
        UsageError: unknown mode, or offloading without a GPU.
    """
    check_offload(device, offload)
    if offload == "none":
        return pipe.to(device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        offload_blocks(pipe, device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    return pipe


def offload_blocks(pipe: Any, device: str) -> None:
    """diffusers' group offloading on the experts; everything else goes to the device.

    On a GPU a second stream fetches the next block while one computes, from page-locked memory.
    """
    import torch

    experts = experts_of(pipe)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and name not in experts:
            module.to(device)
    for expert in experts.values():
        expert.enable_group_offload(
            onload_device=torch.device(device),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=torch.device(device).type != "cpu",
        )


def check_offload(device: str | None, offload: str) -> None:
    """Refuse an offload mode that this device (None: not known yet) cannot have.

    Raises:
        UsageError: unknown mode, or offloading without a GPU.
    """
    if offload not in OFFLOAD_MODES:
        raise UsageError(f"--offload must be one of {', '.join(OFFLOAD_MODES)}, found {offload!r}.")
    if offload != "none" and device == "cpu":
        raise UsageError(f"--offload {offload} moves weights between a GPU and the CPU; without a GPU use none.")


def split_over_processes(expert: Any, size: int) -> None:
    """Let the processes of the group share every call of this expert: diffusers' Ulysses context parallelism.

    Raises:
        UsageError: its attention backend cannot do that.
    """
    from diffusers import ContextParallelConfig

    try:
        expert.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))
    except ValueError as error:
        raise UsageError(f"--context-parallel cannot be used here: {error}") from error
