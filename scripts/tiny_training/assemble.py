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
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from ptq.tiny.detect import adherence, detect
from ptq.tiny.grammar import held_out_prompts, parse_prompt

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


def expert(work: Path, stage: str) -> WanTransformer3DModel:
    """The averaged weights of ``stage``, or of the trunk while that stage has not run."""
    path = work / f"{stage}.pt"
    model = WanTransformer3DModel(**CONFIG)
    model.load_state_dict(torch.load(path if path.is_file() else work / "trunk.pt", weights_only=False)["ema"])
    return model.eval().requires_grad_(False)


def assemble(work: Path, out: Path, seed: int) -> None:
    """Write ``out/tiny/``, its generation defaults included, from the checkpoints in ``work``."""
    stats = torch.load(work / "latents.pt", weights_only=False)
    vae = vae_stage.load(work)
    vae.register_to_config(latents_mean=stats["mean"].tolist(), latents_std=stats["std"].tolist())
    tokenizer = make_tokenizer()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=make_encoder(tokenizer, seed),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        transformer=expert(work, "high"),
        transformer_2=expert(work, "low"),
        boundary_ratio=BOUNDARY,
    )
    shutil.rmtree(out / "tiny", ignore_errors=True)
    pipe.to(torch.bfloat16).save_pretrained(out / "tiny")
    (out / "tiny" / PRESET).write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")
    size = sum(p.stat().st_size for p in (out / "tiny").rglob("*") if p.is_file())
    print(f"{out / 'tiny'}: {size / 1e6:.2f} MB")


def generate(pipe: WanPipeline, prompt: str, seed: int, settings: dict[str, Any]) -> np.ndarray:
    """One clip, uint8 ``[T, H, W, 3]``, by the pipeline call."""
    video = pipe(
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


def evaluate(work: Path, out: Path, units: int, overrides: dict[str, Any] | None = None) -> dict[str, float]:
    """Means of the adherence scores over ``units`` held-out (prompt, seed) units; also saves the clips."""
    settings = json.loads((out / "tiny" / PRESET).read_text(encoding="utf-8")) | (overrides or {})
    pipe = WanPipeline.from_pretrained(out / "tiny", torch_dtype=torch.float32)
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
    Log(work / "evaluate.jsonl")(stage="evaluate", units=units, steps=settings["steps"], **means)
    np.savez_compressed(work / "evaluate.npz", clips=np.stack(clips), prompts=np.array(prompts))
    return means
