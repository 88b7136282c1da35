"""Stages ``assemble`` and ``evaluate``: write the pipeline directory, then measure it on held-out units.

The directory is what ``WanPipeline.from_pretrained`` reads, bf16 weights on disk. Evaluation is the
real pipeline call in float32 with guidance, and the detectors of ``ptq.tiny.detect``.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image

from ptq.tiny.detect import adherence, detect
from ptq.tiny.grammar import held_out_prompts, parse_prompt
from ptq.tiny.world import render

from . import i2v
from . import vae as vae_stage
from .common import BOUNDARY, FPS, FRAMES, MAX_TOKENS, SHIFT, SIZE, Log
from .denoiser import CONFIG
from .text import make_encoder, make_tokenizer

PRESET = "ptq_preset.json"
DEFAULTS: dict[str, Any] = {
    "variant": "T2V-A14B",
    "hub_id": None,
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "fps": FPS,
    "steps": 10,
    "flow_shift": SHIFT,
    "guidance_scale": 3.0,
    "guidance_scale_2": 2.0,
    "negative_prompt": "",
    "max_sequence_length": MAX_TOKENS,
}


SHARED = ("vae", "text_encoder", "tokenizer")
"""Parts of `tiny` that `tiny-i2v` links to."""


def expert(work: Path, stage: str) -> WanTransformer3DModel:
    """The averaged weights of ``stage``."""
    model = WanTransformer3DModel(**(CONFIG | i2v.CHANGES if stage.startswith("i2v-") else CONFIG))
    model.load_state_dict(torch.load(work / f"{stage}.pt", weights_only=False)["ema"])
    return model.eval().requires_grad_(False)


def assemble(work: Path, out: Path, seed: int) -> None:
    """Write ``out/tiny/`` and, when its experts are there, ``out/tiny-i2v/`` with generation defaults, from ``work``."""
    stats = torch.load(work / "latents.pt", weights_only=False)
    vae = vae_stage.load(work)
    vae.register_to_config(latents_mean=stats["mean"].tolist(), latents_std=stats["std"].tolist())
    tokenizer = make_tokenizer()
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": make_encoder(tokenizer, seed),
        "vae": vae,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        "boundary_ratio": BOUNDARY,
    }
    pipe = WanPipeline(**parts, transformer=expert(work, "high"), transformer_2=expert(work, "low"))
    write(pipe, out / "tiny", DEFAULTS)
    if (work / "i2v-high.pt").is_file() and (work / "i2v-low.pt").is_file():
        experts = {"transformer": expert(work, "i2v-high"), "transformer_2": expert(work, "i2v-low")}
        pipe = WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, **experts)
        write(pipe, out / "tiny-i2v", DEFAULTS | {"variant": "I2V-A14B"})
        for name in SHARED:
            shutil.rmtree(out / "tiny-i2v" / name)
            (out / "tiny-i2v" / name).symlink_to(Path("..") / "tiny" / name)


def write(pipe: DiffusionPipeline, directory: Path, settings: dict[str, Any]) -> None:
    """Save in bf16 with the preset, and print the size."""
    shutil.rmtree(directory, ignore_errors=True)
    pipe.to(torch.bfloat16).save_pretrained(directory)
    (directory / PRESET).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    size = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
    print(f"{directory}: {size / 1e6:.2f} MB")


def generate(pipe: DiffusionPipeline, prompt: str, seed: int, settings: dict[str, Any]) -> np.ndarray:
    """One clip, uint8 ``[T, H, W, 3]``, by the pipeline call; an image-to-video pipeline gets a rendered first frame."""
    start = {}
    if isinstance(pipe, WanImageToVideoPipeline):
        first = render(parse_prompt(prompt), seed, settings["num_frames"], settings["height"], settings["width"])[0]
        start = {"image": Image.fromarray(first)}
    video = pipe(
        **start,
        prompt=prompt,
        negative_prompt=settings["negative_prompt"],
        num_frames=settings["num_frames"],
        height=settings["height"],
        width=settings["width"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        guidance_scale_2=settings["guidance_scale_2"],
        max_sequence_length=settings["max_sequence_length"],
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    return np.round(np.asarray(video) * 255.0).clip(0, 255).astype(np.uint8)


def evaluate(work: Path, directory: Path, units: int) -> dict[str, float]:
    """Means of the adherence scores over ``units`` held-out (prompt, seed) units; also saves the clips."""
    settings = json.loads((directory / PRESET).read_text(encoding="utf-8"))
    pipe = DiffusionPipeline.from_pretrained(directory, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rows, clips, began = [], [], time.time()
    prompts = held_out_prompts(units)
    for i, prompt in enumerate(prompts):
        frames = generate(pipe, prompt, 1000 + i, settings)
        scene, found = parse_prompt(prompt), detect(frames)
        row = adherence(frames, scene)
        row["size_hit"] = float(found.size == scene.size)
        row["background_hit"] = float(found.background == scene.background)
        row["displacement"], row["path_error"] = found.displacement, found.path_error
        row["overlap"] = found.shape_overlap[scene.shape]
        row["colour_distance"] = found.colour_distance[scene.colour]
        rows.append(row)
        clips.append(frames)
    means = {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
    means["seconds_per_clip"] = (time.time() - began) / units
    Log(work / "evaluate.jsonl")(stage="evaluate", model=directory.name, units=units, steps=settings["steps"], **means)
    np.savez_compressed(work / f"evaluate-{directory.name}.npz", clips=np.stack(clips), prompts=np.array(prompts))
    return means
