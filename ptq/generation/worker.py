"""One unit from claim to manifest line: image, sampling, files, record; and what happens when any of that fails.

A unit that fails is recorded and the run goes on. What would hit every following unit too, a full disk or a lost GPU,
ends the run instead, before hours are spent.
"""

from __future__ import annotations

import hashlib
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save

from ptq import ui
from ptq.errors import DamagedFileError, PtqError
from ptq.generation.claims import Claims
from ptq.generation.directory import GenerationDirectory
from ptq.generation.group import LostGroupError
from ptq.generation.sampling import BrokenOutputError, Sampled, Sampler, StepCallback
from ptq.generation.units import Unit
from ptq.generation.video import encode_video, write_frames, write_video
from ptq.prompts.images import RESIZE_POLICY, fit_image, load_image
from ptq.store.files import sha256_file, write_bytes
from ptq.store.run_manifest import ManifestLine, Manifests
from ptq.wan.identity import ModelIdentity

Result = Literal["done", "failed", "broken", "elsewhere"]
Draft = dict[str, Any]
"""Fields of a `ManifestLine` while its unit is made."""
_LATER = (
    *("image", "image_sha256", "latent_sha256", "seconds", "peak_memory_bytes", "video", "video_sha256"),
    *("final_latents", "final_latents_sha256", "saved_frames"),
)
"""Fields that stay null in the line of a unit that failed before they were known."""


@dataclass
class Worker:
    """Makes units of one run in this process. `load_pipeline` is called at the first unit."""

    directory: GenerationDirectory
    manifests: Manifests
    claims: Claims
    model: ModelIdentity
    load_sampler: Callable[[], Sampler]
    device: str
    _sampler: Sampler | None = None

    def make(self, unit: Unit, on_step: StepCallback) -> Result:
        """Claim a unit, make it, record it.

        Returns:
            "done", "failed" (worth another try), "broken" (the model gave an unusable result and would again), or
            "elsewhere": another process has made it or is making it.

        Raises:
            PtqError: the disk is full, the GPU was lost, or the settings do not fit the model.
        """
        seen = self.manifests.get(unit.name)
        if not self.claims.acquire(unit.stem):
            return "elsewhere"
        try:
            self.manifests.refresh()
            now = self.manifests.get(unit.name)
            if now is not None and now is not seen and now.is_done:
                return "elsewhere"
            if self._sampler is None:
                self._sampler = self.load_sampler()
            return self._attempt(unit, self._sampler, on_step)
        finally:
            self.claims.release()

    def _attempt(self, unit: Unit, sampler: Sampler, on_step: StepCallback) -> Result:
        started = time.monotonic()
        seed = unit.seed(sampler.settings.seed, sampler.settings.seed_scheme)
        line = self._describe(unit, sampler, seed)
        cuda = torch.device(self.device).type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            image = self._image(unit, sampler, line)
            sampled = sampler.make(unit.sample.prompt, seed, image, on_step)
            video = encode_video(sampled.frames, sampler.settings.fps)
        except (PtqError, RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            self._record_failure(unit, line, error, started)
            return "broken" if isinstance(error, BrokenOutputError) else "failed"
        try:
            self._save(unit, sampled, video, line, sampler)
        except (DamagedFileError, MemoryError) as error:
            self._record_failure(unit, line, error, started)
            return "failed"
        line["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device) if cuda else _peak_process_bytes()
        line["seconds"] = round(time.monotonic() - started, 3)
        self.manifests.append(ManifestLine(**line, finished=_now(), status="done", error=None))
        return "done"

    def _describe(self, unit: Unit, sampler: Sampler, seed: int) -> Draft:
        settings, sample = sampler.settings, unit.sample
        return {
            "unit": unit.name,
            "dataset": sample.dataset,
            "sample_id": sample.id,
            "k": unit.k,
            "prompt": sample.prompt,
            "score_prompt": sample.score_prompt,
            "seed": seed,
            "width": settings.width,
            "height": settings.height,
            "frames": settings.num_frames,
            "fps": settings.fps,
            "steps": settings.steps,
            "flow_shift": settings.flow_shift,
            "guidance_scale": settings.guidance_scale,
            "guidance_scale_2": settings.guidance_scale_2,
            "checkpoint_digest": self.model.digest,
            "device": _device_name(self.device),
            **dict.fromkeys(_LATER),
        }

    def _image(self, unit: Unit, sampler: Sampler, line: Draft) -> np.ndarray | None:
        """The sample's image as the model gets it; its digest is over those pixels, uint8 [height, width, 3]."""
        if not sampler.settings.image_to_video:
            return None
        media = unit.sample.media
        if media is None:
            raise PtqError(f"Sample {unit.sample.id} has no image, but the run is image-to-video.")
        image = fit_image(load_image(media), sampler.settings.height, sampler.settings.width)
        line["image"] = media.path
        line["image_sha256"] = hashlib.sha256(image.tobytes()).hexdigest()
        line["image_source"] = {"kind": media.kind, "frame": media.frame, "crop": media.crop, "resize": RESIZE_POLICY}
        return image

    def _save(self, unit: Unit, sampled: Sampled, video: bytes, line: Draft, sampler: Sampler) -> None:
        """Write the unit's files, the video last; a file that cannot be written takes the others with it."""
        directory, settings = self.directory, sampler.settings
        paths = {folder: directory.file(folder, unit.stem) for folder in ("latents", "frames", "videos")}
        latents = save({"latents": sampled.latents})
        try:
            write_bytes(paths["latents"], latents)
            if settings.save_frames:
                write_frames(paths["frames"], sampled.frames)
                line["saved_frames"] = str(paths["frames"].relative_to(directory.path))
                line["saved_frames_sha256"] = sha256_file(paths["frames"])
            write_video(paths["videos"], video, settings.num_frames, settings.height, settings.width)
        except (PtqError, MemoryError):
            for path in paths.values():
                path.unlink(missing_ok=True)
            raise
        line["latent_sha256"] = sampled.initial_sha256
        line["final_latents"] = str(paths["latents"].relative_to(directory.path))
        line["final_latents_sha256"] = hashlib.sha256(latents).hexdigest()
        line["video"] = str(paths["videos"].relative_to(directory.path))
        line["video_sha256"] = hashlib.sha256(video).hexdigest()

    def _record_failure(self, unit: Unit, line: Draft, error: Exception, started: float) -> None:
        text = str(error).strip() or type(error).__name__
        if not isinstance(error, PtqError):
            text = f"{type(error).__name__}: {text}"
        line["seconds"] = round(time.monotonic() - started, 3)
        self.manifests.append(ManifestLine(**line, finished=_now(), status="failed", error=text))
        self.manifests.refresh()
        ui.warn(f"Unit {unit.name} failed: {text}")
        if isinstance(error, LostGroupError):
            raise error
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        elif isinstance(error, torch.AcceleratorError):
            raise PtqError(
                f"The GPU stopped working while making unit {unit.name} ({text}). Every further unit would fail in this process; run the same command again to continue."
            ) from error


def _peak_process_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()})"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
