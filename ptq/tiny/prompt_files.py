"""Prompt files of the tiny world, as any user's file: one prompt a line, or JSON lines with a rendered first frame each."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from ptq.store.files import write_bytes
from ptq.tiny import defaults
from ptq.tiny.grammar import parse_prompt
from ptq.tiny.world import render


def write_prompt_file(directory: Path, name: str, prompts: Sequence[str], *, images: bool) -> Path:
    """Write prompts to `directory/name.txt`, or with images to `directory/name.jsonl` and `directory/name/NNN.png`.

    Args:
        prompts: texts of the tiny world's grammar.
        images: give each prompt the first frame of a clip that shows it; its position in the list seeds the path.

    Returns:
        The prompt file.

    Raises:
        ValueError: a prompt that is not of the tiny world (with images).
    """
    if not images:
        path = directory / f"{name}.txt"
        write_bytes(path, ("\n".join(prompts) + "\n").encode())
        return path
    from PIL import Image

    settings, lines = defaults("tiny-i2v"), []
    for i, prompt in enumerate(prompts):
        clip = render(parse_prompt(prompt), i, settings["num_frames"], settings["height"], settings["width"])
        picture = io.BytesIO()
        Image.fromarray(clip[0]).save(picture, "png")
        image = f"{name}/{i:03d}.png"
        write_bytes(directory / image, picture.getvalue())
        lines.append(json.dumps({"id": f"{i:03d}", "prompt": prompt, "image": image}))
    path = directory / f"{name}.jsonl"
    write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path
