"""Prompts of the tiny world: a grammar with synonyms, its inverse, the fixed prompt sets, and their files.

Every prompt names all five attributes of a scene, in several word orders. ``parse_prompt`` inverts
every sentence the grammar can make and refuses words it does not know. No text encoder here.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ptq.store.files import write_bytes
from ptq.tiny import defaults
from ptq.tiny.world import Scene, held_out_scenes, render, train_scenes

_T = TypeVar("_T")
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "disk"),
    "triangle": ("triangle", "pyramid"),
    "ring": ("ring", "hoop", "donut"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "lemon"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "cobalt"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "magenta"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "black": ("black", "dark"),
    "grey": ("grey", "gray"),
    "white": ("white", "bright"),
    "striped": ("striped", "stripy"),
}
DIRECTION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left", "leftward"),
    "right": ("right", "rightward"),
    "up": ("up", "upward", "top"),
    "down": ("down", "downward", "bottom"),
}
_DIRECTION_PHRASES = {
    "left": ("left", "to the left", "leftward"),
    "right": ("right", "to the right", "rightward"),
    "up": ("up", "to the top", "upward"),
    "down": ("down", "to the bottom", "downward"),
}
_VERBS = (("moves", "moving"), ("slides", "sliding"), ("drifts", "drifting"), ("glides", "gliding"))
_PLACES = ("background", "backdrop")
_PREPOSITIONS = ("on", "over")
_FILLERS = frozenset(["a", "an", "the", "to", "and", "of", "video", "clip", "diagonally", "toward"])

MEANINGS: dict[str, dict[str, str]] = {
    kind: {word: name for name, words in table.items() for word in words}
    for kind, table in {
        "shape": SHAPE_WORDS,
        "colour": COLOUR_WORDS,
        "size": SIZE_WORDS,
        "background": BACKGROUND_WORDS,
        "direction": DIRECTION_WORDS,
    }.items()
}
"""Attribute -> word -> the value it names."""

NEUTRAL = _FILLERS | {w for pair in _VERBS for w in pair} | set(_PLACES) | set(_PREPOSITIONS)
"""Words that name nothing; with those of `MEANINGS` the whole vocabulary, which the tokenizer is made for."""


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def prompt_for(scene: Scene, rng: np.random.Generator | int) -> str:
    """A sentence for ``scene``; ``rng`` (seed or Generator) picks the word order and the synonyms."""
    gen = np.random.default_rng(rng)

    def pick(options: Sequence[_T]) -> _T:
        return options[int(gen.integers(len(options)))]

    size, colour = pick(SIZE_WORDS[scene.size]), pick(COLOUR_WORDS[scene.colour])
    thing = f"{size} {colour} {pick(SHAPE_WORDS[scene.shape])}"
    verb, verbing = pick(_VERBS)
    where = pick(_DIRECTION_PHRASES[scene.direction])
    place = f"{pick(_PREPOSITIONS)} a {pick(BACKGROUND_WORDS[scene.background])} {pick(_PLACES)}"
    a = _article(size)
    return pick(
        (
            f"{a} {thing} {verb} {where} {place}",
            f"{a} {thing} {verbing} {where} {place}",
            f"{place}, {a} {thing} {verb} {where}",
            f"a video of {a} {thing} {verbing} {where} {place}",
        )
    )


def parse_prompt(prompt: str) -> Scene:
    """The scene a prompt asks for; the inverse of :func:`prompt_for`.

    Raises ValueError naming the word that is unknown, or the attribute that is missing or named twice.
    """
    found: dict[str, set[str]] = {kind: set() for kind in MEANINGS}
    for word in re.findall(r"[^\W_]+", prompt.lower()):
        kinds = [kind for kind, table in MEANINGS.items() if word in table]
        if not kinds and word not in NEUTRAL:
            raise ValueError(f"prompt {prompt!r}: the tiny world does not know the word {word!r}")
        for kind in kinds:
            found[kind].add(MEANINGS[kind][word])
    values: dict[str, str] = {}
    for kind in MEANINGS:
        if len(found[kind]) != 1:
            state = "names no" if not found[kind] else "names more than one"
            raise ValueError(f"prompt {prompt!r} {state} {kind}; choose one of {', '.join(sorted(MEANINGS[kind]))}")
        values[kind] = found[kind].pop()
    return Scene(**values)


def _prompts(pool: tuple[Scene, ...], n: int, seed: int) -> list[str]:
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    gen = np.random.default_rng(seed)
    prompts: list[str] = []
    seen: set[str] = set()
    while len(prompts) < n:
        for i in gen.permutation(len(pool)):
            prompt = prompt_for(pool[int(i)], gen)
            if prompt not in seen:
                seen.add(prompt)
                prompts.append(prompt)
            if len(prompts) == n:
                break
    return prompts


def held_out_prompts(n: int, seed: int = 7) -> list[str]:
    """``n`` distinct evaluation prompts over held-out scenes; the first k of a longer list are the shorter list."""
    return _prompts(held_out_scenes(), n, seed)


def calibration_prompts(n: int, seed: int = 11) -> list[str]:
    """``n`` distinct calibration prompts over training scenes: no scene of the held-out prompts is among them."""
    return _prompts(train_scenes(), n, seed)


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
