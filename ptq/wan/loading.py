"""From what a user types (MODEL) to a pipeline: the embedded model, a directory, a hub id, a packed checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq.errors import PtqError, UsageError
from ptq.wan.original import refuse_original
from ptq.wan.structure import ModelLayout, read_layout

if TYPE_CHECKING:
    import torch


OUTLIERS = "-outliers"
"""`tiny-outliers` is derived from `tiny` when it is first asked for."""


def resolve_model(model: str, revision: str | None = None) -> ModelLayout:
    """Find MODEL: `tiny`, a local diffusers directory, or a hub id (downloaded to the usual cache).

    Raises:
        UsageError: nothing of that name.
        PtqError: it is there but not a Wan pipeline.
    """
    if Path(model).exists():
        refuse_original(Path(model))
        return read_layout(model)
    embedded = _embedded(model)
    if embedded is not None:
        return read_layout(embedded)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return read_layout(_download(model, revision))
    raise UsageError(
        f"There is no model {model!r}: not a directory, not an embedded model, not a hub id of the form owner/name. Pass a Wan 2.2 pipeline directory, Wan-AI/Wan2.2-T2V-A14B-Diffusers, or `tiny`."
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


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PtqError(
            f"Could not download {model} ({type(error).__name__}: {error}). Check the name and the network, or pass a local directory."
        ) from error


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
        kwargs: passed on to diffusers (for example device_map).

    Returns:
        A diffusers WanPipeline or WanImageToVideoPipeline.

    Raises:
        PtqError: missing, damaged or foreign files, named with what to do.
    """
    import torch
    from diffusers import AutoencoderKLWan, DiffusionPipeline

    from ptq.checkpoint.shards import ShardSet

    layout = resolve_model(str(model))
    for expert in layout.experts:
        ShardSet(layout.path / expert)  # headers checked before hours or gigabytes are spent
    if dtype is None:
        dtype = torch.bfloat16 if device is not None and torch.device(device).type == "cuda" else torch.float32
    vae = AutoencoderKLWan.from_pretrained(layout.path, subfolder="vae", torch_dtype=torch.float32)
    pipeline = DiffusionPipeline.from_pretrained(layout.path, vae=vae, torch_dtype=dtype, **kwargs)
    return pipeline if device is None else pipeline.to(device)


def with_image_input(pipe: Any) -> Any:
    """A pipeline that starts from an image: TI2V-5B directories name WanPipeline, but the same modules make an
    image-to-video pipeline. Other pipelines come back as they are."""
    import inspect

    if "image" in inspect.signature(pipe.__call__).parameters or not pipe.config.expand_timesteps:
        return pipe
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**pipe.components, boundary_ratio=pipe.config.boundary_ratio, expand_timesteps=True)
