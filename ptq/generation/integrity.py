"""Whether a unit that the manifest calls done is really there, whole, and made from the sample that is asked for now."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ptq import ui
from ptq.errors import PtqError
from ptq.generation.settings import Settings
from ptq.generation.units import Unit
from ptq.store.files import sha256_file
from ptq.store.run_manifest import FILE_KEYS, ManifestLine, Manifests


def find_damage(root: Path, line: ManifestLine, keys: Sequence[str] = FILE_KEYS) -> str | None:
    """What is wrong with the files of these kinds of a finished unit (missing, changed, without a digest), or None."""
    for key in keys:
        name, expected = getattr(line, key), getattr(line, f"{key}_sha256")
        if not name:
            return f"Its manifest line names no {key}"
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if not expected:
            return f"The manifest has no digest of {name}, as in earlier versions, so it cannot be checked"
        if sha256_file(path) != expected:
            return f"{name} is truncated or was changed"
    return None


def refuse_other_sample(root: Path, line: ManifestLine, unit: Unit, settings: Settings) -> None:
    """A finished unit must come from the same prompt, image and seed, which by scheme vbench is the prompt's place.

    Raises:
        PtqError: the prompt file says something else for this id now.
    """
    media = unit.sample.media if settings.image_to_video else None
    wanted = {
        "prompt": unit.sample.prompt,
        "score_prompt": unit.sample.score_prompt,
        "image": media.path if media is not None else None,
        "seed": unit.seed(settings.seed, settings.seed_scheme),
    }
    for key, value in wanted.items():
        if getattr(line, key) != value:
            raise PtqError(
                f"{root} holds unit {unit.name}, made with {key} {ui.shorten(repr(getattr(line, key)))}, but the sample of that id now has {ui.shorten(repr(value))}. Videos of two prompt files are never mixed: choose another --out, or pass --fresh to delete the run and start over."
            )


def select_pending(root: Path, manifests: Manifests, units: Sequence[Unit], settings: Settings) -> list[Unit]:
    """The units that have to be made: new, failed before, or done but damaged (a message names those).

    Every file that a finished unit has under these settings is read once and compared with its digest in the manifest.

    Raises:
        PtqError: a finished unit comes from another prompt, image or seed.
    """
    finished = [(unit, line) for unit in units if (line := manifests.get(unit.name)) and line.is_done]
    keys = [key for key in FILE_KEYS if key != "saved_frames" or settings.save_frames]
    whole: set[str] = set()
    with ui.progress("Checking finished videos", len(finished)) if finished else nullcontext() as bar:
        for unit, line in finished:
            refuse_other_sample(root, line, unit, settings)
            problem = find_damage(root, line, keys)
            if problem is None:
                whole.add(unit.name)
            else:
                ui.warn(f"{problem}; unit {unit.name} is made again.")
            if bar is not None:
                bar.advance()
    return [unit for unit in units if unit.name not in whole]
