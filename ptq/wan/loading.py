"""From what a user types (MODEL) to a pipeline: the embedded model, a directory, a hub id, a packed checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq import ui
from ptq.errors import PtqError, UsageError
from ptq.wan.foreign import refuse_no_pipeline
from ptq.wan.layout import ModelLayout, read_layout

if TYPE_CHECKING:
    import torch


OUTLIERS = "-outliers"
"""`tiny-outliers` is derived from `tiny` when it is first asked for."""
PIPELINE_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.md"]
"""What is fetched of a hub repository: no pickles, and no second copy in another layout."""


def resolve_model(model: str) -> ModelLayout:
    """Find MODEL as `find_model`, and check it whole.

    Raises:
        UsageError, PtqError: as `find_model`; also damaged (`check_model`).
    """
    layout = find_model(model)
    from ptq.wan.check import check_model

    check_model(layout)
    return layout


def find_model(model: str) -> ModelLayout:
    """Find MODEL: `tiny`, a local diffusers directory, or a hub id, downloaded to the usual cache. Reads its JSON files only.

    Raises:
        UsageError: nothing of that name.
        PtqError: it is there, but none of the variants that are known.
    """
    return read_layout(_find(model))


def find_local_model(model: str) -> ModelLayout:
    """Find MODEL as `find_model`, but only what is on this machine: nothing is downloaded.

    Raises:
        UsageError, PtqError: as `find_model`.
    """
    found = _find_here(model)
    if found is None:
        raise UsageError(
            f"There is no model {model!r} on this machine: not a directory, not an embedded model. Models of the hub are downloaded by `ptq calibrate` and `ptq generate`; pass a pipeline directory, a packed checkpoint or `tiny`."
        )
    return read_layout(found)


def _find_here(model: str) -> Path | None:
    return Path(model) if Path(model).exists() else _embedded(model)


def _find(model: str) -> Path:
    here = _find_here(model)
    if here is not None:
        return here
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        ui.info(f"Looking for {model} on the hub.")
        texts = _download(model, ["*.json"])
        if not (texts / "model_index.json").is_file():
            refuse_no_pipeline(texts, model, _repository_files(model))
        read_layout(texts)  # refused before 70 GB are fetched
        return _download(model, PIPELINE_FILES)
    raise UsageError(
        f"There is no model {model!r}: not a directory, not an embedded model, not a hub id of the form owner/name. Pass a pipeline directory of Wan 2.2 or 2.1, Wan-AI/Wan2.2-T2V-A14B-Diffusers, or `tiny`."
    )


def _embedded(model: str) -> Path | None:
    from ptq.tiny import assets_dir

    name = model.removesuffix(OUTLIERS)
    try:
        directory = assets_dir(name)
    except FileNotFoundError:
        return None
    if name == model:
        return directory
    from ptq.wan.outliers import outlier_directory

    return outlier_directory(directory)


def _download(model: str, only: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=only))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PtqError(
            f"Could not download {model} ({type(error).__name__}: {error}). Check the name and the network, or pass a local directory."
        ) from error


def _repository_files(model: str) -> list[str]:
    """Names of a hub repository's files; [] where it cannot be asked."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return list_repo_files(model)
    except (HfHubHTTPError, OSError):
        return []


def load_pipeline(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> Any:
    """Load a Wan pipeline, original or packed, with the class that its model_index.json names.

    Args:
        model: `tiny`, a directory, or a hub id.
        dtype: dtype of unpacked weights; default float32 on the CPU and bfloat16 on a GPU.
        device: where to put the pipeline; default: stays on the CPU.
        kwargs: passed on to diffusers (for example device_map, or a component, None to do without it).

    Returns:
        A diffusers WanPipeline or WanImageToVideoPipeline.

    Raises:
        PtqError: missing, damaged or foreign files, named with what to do.
    """
    import torch
    from diffusers import AutoencoderKLWan, DiffusionPipeline

    from ptq.wan.check import LOADING_ERRORS, shorten_error

    layout = resolve_model(str(model))
    if dtype is None:
        dtype = torch.bfloat16 if device is not None and torch.device(device).type == "cuda" else torch.float32
    try:
        if "vae" not in kwargs:
            kwargs["vae"] = AutoencoderKLWan.from_pretrained(
                layout.path, subfolder="vae", dtype=torch.float32, use_safetensors=True
            )
        pipeline = DiffusionPipeline.from_pretrained(layout.path, dtype=dtype, use_safetensors=True, **kwargs)
    except LOADING_ERRORS as error:
        raise PtqError(
            f"diffusers could not load {layout.path}: {shorten_error(error)}. The model's files passed their checks; see whether its tokenizer is whole and the installed diffusers and transformers are those of `ptq doctor`."
        ) from error
    return pipeline if device is None else pipeline.to(device)
