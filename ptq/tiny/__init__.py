"""The embedded tiny world: a renderer, detectors, and a small trained two-expert Wan pipeline that draws it.

This file only locates the shipped assets; it loads no model and imports no heavy library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ASSETS = Path(__file__).resolve().parent / "assets"


def assets_dir(name: str = "tiny") -> Path:
    """Directory of the shipped diffusers pipeline ``name`` (``model_index.json`` inside).

    Raises FileNotFoundError with the choices when there is none of that name.
    """
    path = _ASSETS / name
    if not (path / "model_index.json").is_file():
        known = [found.name for found in embedded()]
        raise FileNotFoundError(f"no embedded pipeline {name!r}; shipped: {', '.join(known) or 'none'}")
    return path


def embedded() -> list[Path]:
    """Directories of all shipped pipelines, sorted."""
    return sorted(path.parent for path in _ASSETS.glob("*/model_index.json"))


def defaults(name: str = "tiny") -> dict[str, Any]:
    """Generation defaults of the embedded pipeline: frames, size, fps, steps, shift, guidance, negative prompt."""
    data: dict[str, Any] = json.loads((assets_dir(name) / "ptq_preset.json").read_text(encoding="utf-8"))
    return data
