"""One unit through a diffusers Wan pipeline: noise, denoising with a check after every step, decoding with checks.

The pipeline runs as diffusers wrote it, with `output_type="latent"` and the initial noise passed in; the latents are then
decoded as the end of its `__call__` does. No step is added to or taken from the method. Files are `run.py`'s job.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ptq.errors import PtqError, UsageError
from ptq.generation.nonfinite import Call, find_nonfinite, recorded_calls
from ptq.generation.settings import Settings
from ptq.wan.attention import SLOTS, check_attention, use_flash_3
from ptq.wan.block import video_tokens
from ptq.wan.caching import enable_cache, forget_cached
from ptq.wan.pipeline import (
    decode_latents,
    experts_of,
    image_argument,
    latent_shape,
    on_execution_device,
    place_pipeline,
    set_flow_shift,
    split_over_processes,
    takes_image,
    video_pixels,
    with_image_input,
)

if TYPE_CHECKING:
    from ptq.generation.latent import FixedLatent
    from ptq.wan.encoding import TextEncoding

BLACK_LEVEL = 4
"""A video whose brightest value is at or below this (of 255) shows nothing."""
COMPILER = "inductor"
"""Backend of torch.compile."""

StepCallback = Callable[[int], None]


class BrokenOutputError(PtqError):
    """The model itself gave an unusable result; making the unit again would give the same."""


@dataclass(frozen=True)
class Sampled:
    """A finished unit in memory. initial_sha256: of the float32 bytes of the initial latent [C, T, H, W].

    latents: final latents, float32 [C, T, H, W] on the CPU. frames: uint8 [T, H, W, 3] RGB.
    """

    initial_sha256: str
    latents: torch.Tensor
    frames: np.ndarray


class Sampler:
    """A pipeline made ready for one run's settings.

    Args:
        encoding: gives the embeddings of prompts to a pipeline without text encoder; None: the pipeline has its own.
        fixed: the initial latent of every unit, where the settings name one.

    Raises (on construction):
        UsageError: the settings do not fit the pipeline (size, number of frames, guidance, image, backend) or `fixed`.
    """

    def __init__(
        self,
        pipe: Any,
        settings: Settings,
        device: str = "cpu",
        offload: str = "none",
        encoding: TextEncoding | None = None,
        fixed: FixedLatent | None = None,
    ) -> None:
        self.settings, self._encoding = settings, encoding
        if (fixed.digest if fixed else None) != settings.fixed_latent:
            raise UsageError("The fixed latent is not the one that the settings name. Give both, or none.")
        self._fixed = None if fixed is None else torch.from_numpy(fixed.values)[None]
        self.pipe = with_image_input(pipe) if settings.image_to_video else pipe
        _check_fit(self.pipe, settings)
        self._shape = latent_shape(self.pipe, settings.height, settings.width, settings.num_frames)
        set_flow_shift(self.pipe, settings.flow_shift)
        self._experts = experts_of(self.pipe)
        for module in self._experts.values():
            _set_attention(module, settings, device)
        enable_cache(self._experts, settings.cache)
        place_pipeline(self.pipe, device, offload)
        if settings.compile:
            for module in self._experts.values():
                module.compile_repeated_blocks(fullgraph=True, backend=COMPILER)
        if settings.context_parallel > 1:
            config = next(iter(self._experts.values())).config
            split_tokens(self._experts, settings.context_parallel, video_tokens(config, self._shape[1:]))
        self.pipe.set_progress_bar_config(disable=True)

    def initial_latents(self, seed: int) -> torch.Tensor:
        """The noise that the pipeline itself would draw from a CPU generator, or the fixed one: float32 [1, C, T, H, W]."""
        if self._fixed is not None:
            return self._fixed.clone()
        return torch.randn(self._shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)

    def make(self, prompt: str, seed: int, image: np.ndarray | None, on_step: StepCallback) -> Sampled:
        """Make one video.

        Args:
            image: uint8 [height, width, 3] for image-to-video, else None.
            on_step: called with the number of finished steps.

        Raises:
            BrokenOutputError: a step gave NaN or infinite latents (names step and layer), or the video is not finite,
                black or frozen.
        """
        if self._encoding is not None:
            return self.sample(self._encoding.arguments(prompt), seed, image, on_step)
        texts = {"prompt": prompt, "negative_prompt": self.settings.negative_prompt}
        return self.sample(texts, seed, image, on_step)

    def sample(self, texts: Mapping[str, Any], seed: int, image: np.ndarray | None, on_step: StepCallback) -> Sampled:
        """As `make`, with the arguments that say the texts: themselves, or their embeddings on the CPU."""
        settings = self.settings
        initial = self.initial_latents(seed)
        forget_cached(self._experts)
        with recorded_calls(self._experts) as calls, torch.no_grad():

            def after_step(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
                if not torch.isfinite(tensors["latents"]).all():
                    where = self._diagnose(calls)
                    raise BrokenOutputError(
                        f"Step {step + 1} of {settings.steps} (timestep {float(timestep):.0f}) gave latents that are not finite: {where}."
                    )
                calls.clear()
                on_step(step + 1)
                return {}

            final = self.pipe(
                **on_execution_device(self.pipe, texts),
                height=settings.height,
                width=settings.width,
                num_frames=settings.num_frames,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                guidance_scale_2=settings.guidance_scale_2,
                latents=initial,
                output_type="latent",
                callback_on_step_end=after_step,
                max_sequence_length=settings.max_sequence_length,
                **image_argument(image),
            ).frames
        video = decode_latents(self.pipe, final)
        if not torch.isfinite(video).all():
            raise BrokenOutputError(
                "After the last step the latents were finite, but the VAE decoded them to NaN or infinity."
            )
        frames = video_pixels(self.pipe, video)
        check_frames(frames, settings.steps)
        latents = final[0].to("cpu", torch.float32).contiguous()
        return Sampled(hashlib.sha256(initial[0].numpy().tobytes()).hexdigest(), latents, frames)

    def _diagnose(self, calls: list[Call]) -> str:
        if self.settings.context_parallel > 1:  # processes would stop at different layers and wait for each other
            return "run without --context-parallel to have the layer named"
        if self.settings.cache:  # outside of the pipeline's call, the cache does not know which branch it is
            return "run without --cache to have the layer named"
        with torch.compiler.set_stance("force_eager"):  # hooks on single layers are no part of a compiled block
            return find_nonfinite(self._experts, calls)


def split_tokens(experts: Mapping[str, Any], size: int, tokens: int) -> None:
    """Turn on context parallelism over `size` processes in every expert; all processes of the group call this.

    Raises:
        UsageError: the heads or the tokens of a video cannot be shared out evenly, or the attention backend cannot.
    """
    for name, expert in experts.items():
        heads = expert.config.num_attention_heads
        if heads % size or tokens % size:
            raise UsageError(
                f"{name} has {heads} attention heads and this video {tokens} tokens; --context-parallel must divide both, and {size} does not."
            )
        split_over_processes(expert, size)


def check_frames(frames: np.ndarray, steps: int) -> None:
    """Refuse a video that shows nothing or does not move at all.

    Raises:
        BrokenOutputError: black (no value above BLACK_LEVEL) or frozen (all frames equal, of more than one).
    """
    if frames.max() <= BLACK_LEVEL:
        raise BrokenOutputError(
            f"The video is black after step {steps} of {steps}: no value is above {BLACK_LEVEL}/255."
        )
    if len(frames) > 1 and all(np.array_equal(frame, frames[0]) for frame in frames[1:]):
        raise BrokenOutputError(
            f"The video is frozen after step {steps} of {steps}: all {len(frames)} frames are equal."
        )


def _check_fit(pipe: Any, settings: Settings) -> None:
    if takes_image(pipe) != settings.image_to_video:
        wanted, is_a = (
            ("image-to-video", "text-to-video") if settings.image_to_video else ("text-to-video", "image-to-video")
        )
        raise UsageError(f"The run is {wanted}, but {type(pipe).__name__} is an {is_a} pipeline.")
    if settings.guidance_scale_2 is not None and pipe.config.boundary_ratio is None:
        raise UsageError("This model has one expert; leave out --guidance-scale-2.")


def _set_attention(module: Any, settings: Settings, device: str) -> None:
    backend = settings.attention_backend
    if backend is None:
        return
    if backend in SLOTS:
        check_attention(backend, settings.dtype, settings.context_parallel, device)
        use_flash_3(module, backend)
        return
    try:
        module.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"The attention backend {backend!r} cannot be used here: {error}") from error
