"""Synthetic generation directories for the evaluation tests: real videos, latents and manifests, no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from safetensors.numpy import save_file

from ptq import evaluation
from ptq.store.files import sha256_file
from ptq.tiny.grammar import held_out_prompts, parse_prompt
from ptq.tiny.world import render


def evaluate_runs(*runs: Path, **options: Any) -> dict[str, Any]:
    """The content of evaluation.json."""
    return evaluation.evaluate_runs(*runs, **options).as_json()


def evaluate_imported(*files: Path, **options: Any) -> dict[str, Any]:
    """The content of evaluation.json."""
    return evaluation.evaluate_imported(*files, **options).as_json()


def write_video(path: Path, frames: np.ndarray, fps: int = 8, quality: int = 10) -> None:
    """Encode uint8 [T, H, W, 3] as untagged 8-bit yuv420p H.264. x264 with mbtree is not deterministic on small frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(quality), "x264-params": "mbtree=0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def make_run(
    directory: Path,
    clips: Mapping[str, np.ndarray],
    *,
    prompts: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
    latents: Callable[[str], np.ndarray] | None = None,
    save_frames: bool = False,
    save_videos: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a generation directory. `clips` maps `dataset/sample_id/k` to uint8 frames [T, H, W, 3]."""
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps({"digest": hashlib.sha256(directory.name.encode()).hexdigest(),
                                                    "model": "synthetic", **(info or {})}))  # fmt: skip
    with open(directory / "manifest-0of1.jsonl", "w") as manifest:
        for name, frames in clips.items():
            dataset, sample, k = name.rsplit("/", 2)
            safe = f"{dataset}_{sample}-{k}"
            if save_videos:
                write_video(directory / "videos" / f"{safe}.mp4", frames)
            line: dict[str, Any] = {
                "unit": name, "dataset": dataset, "sample_id": sample, "k": int(k),
                "prompt": (prompts or {}).get(name, name), "score_prompt": (prompts or {}).get(name, name),
                "image": None, "image_sha256": None, "seed": int(k) + 1,
                "latent_sha256": hashlib.sha256(name.encode()).hexdigest(),
                "width": frames.shape[2], "height": frames.shape[1], "frames": frames.shape[0], "fps": 8, "steps": 4,
                "flow_shift": 3.0, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "checkpoint_digest": None,
                "video": f"videos/{safe}.mp4", "video_sha256": sha256_file(directory / "videos" / f"{safe}.mp4"),
                "final_latents": None, "saved_frames": None, "status": "done", "error": None, **(extra or {}),
            }  # fmt: skip
            if latents is not None:
                (directory / "latents").mkdir(exist_ok=True)
                save_file({"latents": latents(name)}, directory / "latents" / f"{safe}.safetensors")
                line["final_latents"] = f"latents/{safe}.safetensors"
                line["final_latents_sha256"] = sha256_file(directory / line["final_latents"])
            if save_frames:
                (directory / "frames").mkdir(exist_ok=True)
                np.savez_compressed(directory / "frames" / f"{safe}.npz", frames=frames)
                line["saved_frames"] = f"frames/{safe}.npz"
                line["saved_frames_sha256"] = sha256_file(directory / line["saved_frames"])
            manifest.write(json.dumps(line) + "\n")
    return directory


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Apply `change` to every manifest line; None drops the line."""
    path = directory / "manifest-0of1.jsonl"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line is not None))


def tiny_clips(count: int, *, seed: int = 0, frames: int = 9) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`count` units of the tiny world with correct videos: clips and prompts by unit."""
    prompts = held_out_prompts(count)
    names = [f"tiny/{index:03d}/0" for index in range(count)]
    clips = {
        name: render(parse_prompt(prompt), seed + index, frames)
        for index, (name, prompt) in enumerate(zip(names, prompts, strict=True))
    }
    return clips, dict(zip(names, prompts, strict=True))


def moving_noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random texture that drifts, uint8 [T, H, W, 3]: neither flat nor still, survives encoding."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 220, (height // 8 + 4, width // 8 + 4 + frames, 3)).astype(np.float64)
    texture = np.kron(coarse, np.ones((8, 8, 1)))
    return np.stack([texture[:height, 2 * t : 2 * t + width] for t in range(frames)]).astype(np.uint8)
