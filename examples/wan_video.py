"""A packed Wan checkpoint in plain diffusers: one import, then any pipeline code works as with the original.

ptq demo --format hif4 --units 2        # makes demo-out/hif4, a packed checkpoint of the embedded model
python examples/wan_video.py demo-out/hif4 "a red ring moves left"
"""

import sys

import imageio.v3 as iio
import torch
from diffusers import WanPipeline

import ptq  # noqa: F401  registers the checkpoint format with diffusers

directory, prompt = sys.argv[1:3]
pipe = WanPipeline.from_pretrained(directory)
frames = pipe(
    prompt,
    height=64,
    width=64,
    num_frames=9,
    num_inference_steps=4,
    max_sequence_length=32,
    generator=torch.Generator().manual_seed(0),
).frames[0]
iio.imwrite("video.mp4", (frames * 255).round().astype("uint8"), plugin="pyav", codec="libx264", fps=8)
print(f"video.mp4: {len(frames)} frames")
