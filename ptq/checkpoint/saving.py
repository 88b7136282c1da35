"""What stays with a packed pipeline when diffusers saves it: manifest, preset, sensitivity and model card.

`DiffusionPipeline.save_pretrained` writes the components that it knows and nothing else, so the result would be weights
without their origin. It has no hook; it is wrapped once, when the first packed component is loaded.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ptq.checkpoint.manifest import CARD_FILE, MANIFEST_FILE, hash_files
from ptq.errors import UsageError
from ptq.store.files import read_json, write_json

COMPANIONS = (MANIFEST_FILE, "ptq_preset.json", "ptq_sensitivity.json", CARD_FILE)
"""Files beside the components of a checkpoint."""


def keep_companions(pipeline_class: Any) -> None:
    """Let `save_pretrained` of this class carry the companions of packed pipelines. Calling it again changes nothing."""
    if not hasattr(pipeline_class.save_pretrained, "keeps_companions"):
        pipeline_class.save_pretrained = _keeping(pipeline_class.save_pretrained)


def refuse_pickles(safe_serialization: bool) -> None:
    """Refuse to save packed weights as pickles.

    Raises:
        UsageError: asked for.
    """
    if not safe_serialization:
        raise UsageError(
            "A packed checkpoint is saved as safetensors only: pickles run code when they are opened, and are never read back here. Leave out safe_serialization=False."
        )


def refuse_adapters(tensor_names: Iterable[str]) -> None:
    """Refuse to save a component that an adapter was put into.

    Raises:
        UsageError: there is one.
    """
    if any(".base_layer." in name for name in tensor_names):
        raise UsageError(
            "An adapter lies beside the quantized layers, and a packed checkpoint has no place for it. Call unload_lora_weights() before saving, and keep the adapter's own file."
        )


def _keeping(save: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save)
    def save_pretrained(pipeline: Any, save_directory: Any, safe_serialization: bool = True, **options: Any) -> None:
        packed = _packed(pipeline)
        source = next((directory.parent for directory in packed), None)
        if source is not None:
            refuse_pickles(safe_serialization)
        for component in packed.values():
            refuse_adapters(component.state_dict())
        save(pipeline, save_directory, safe_serialization=safe_serialization, **options)
        if source is not None:
            _copy(source, Path(save_directory))

    save_pretrained.keeps_companions = True  # type: ignore[attr-defined]
    return save_pretrained


def _packed(pipeline: Any) -> dict[Path, Any]:
    """The checkpoint that each packed component of the pipeline was loaded from, and the component."""
    found = {}
    for component in pipeline.components.values():
        directory = getattr(getattr(component, "hf_quantizer", None), "ptq_directory", None)
        if directory is not None:
            found[Path(directory)] = component
    return found


def _copy(source: Path, target: Path) -> None:
    """Digests are those of the files as saved: other components were written anew, in the dtype they were loaded in."""
    if not target.is_dir() or source.resolve() == target.resolve():
        return
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (target / MANIFEST_FILE).exists():
        write_json(target / MANIFEST_FILE, read_json(target / MANIFEST_FILE) | {"files": hash_files(target)})
