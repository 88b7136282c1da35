"""From what a user types (MODEL) to a pipeline: the embedded model, a directory, a hub id, a packed checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq.errors import PtqError, UsageError
from ptq.store.files import read_json
from ptq.wan.layout import ModelLayout, read_layout, refuse_relative
from ptq.wan.variants import EXPERTS, VARIANTS

if TYPE_CHECKING:
    import torch


OUTLIERS = "-outliers"
"""`tiny-outliers` is derived from `tiny` when it is first asked for."""
ORIGINAL_FOLDERS = dict(zip(EXPERTS, ("high_noise_model", "low_noise_model"), strict=True))
"""Expert -> its folder in a release of two experts in the authors' own layout."""
ORIGINAL_CLASS = "WanModel"
"""Class name in the config.json of such a release."""


def resolve_model(model: str) -> ModelLayout:
    """Find MODEL: `tiny`, a local diffusers directory, or a hub id (downloaded to the usual cache).

    Raises:
        UsageError: nothing of that name.
        PtqError: it is there, but none of the variants that are known.
    """
    if Path(model).exists():
        return _read_directory(Path(model))
    embedded = _embedded(model)
    if embedded is not None:
        return read_layout(embedded)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        _read_directory(_download(model, "*.json"))  # refused before 70 GB are fetched
        return read_layout(_download(model))
    raise UsageError(
        f"There is no model {model!r}: not a directory, not an embedded model, not a hub id of the form owner/name. Pass a pipeline directory of Wan 2.2 or 2.1, Wan-AI/Wan2.2-T2V-A14B-Diffusers, or `tiny`."
    )


def _read_directory(path: Path) -> ModelLayout:
    refuse_original(path)
    return read_layout(path)


def find_original(path: Path) -> dict[str, Path]:
    """Expert name -> folder of a release in the authors' own layout; empty where `path` is none.

    Args:
        path: a release directory (`high_noise_model/` and `low_noise_model/`, or one model at the top).
    """
    experts = {name: path / folder for name, folder in ORIGINAL_FOLDERS.items() if (path / folder).is_dir()}
    if len(experts) == len(ORIGINAL_FOLDERS):
        return experts
    return {"transformer": path} if _original_config(path).get("_class_name") == ORIGINAL_CLASS else {}


def refuse_original(path: Path) -> None:
    """Say how to convert where a user passes a release in the authors' own layout.

    Raises:
        PtqError: `path` is one, of a supported variant or of a relative.
    """
    experts = find_original(path)
    config = _original_config(next(iter(experts.values()), path))
    refuse_relative(path, config.get("_class_name"), config.get("model_type"))
    if not experts:
        return
    fitting = [v for v in VARIANTS.values() if (len(v.experts), v.in_channels) == (len(experts), config.get("in_dim"))]
    variant = min(fitting, key=lambda v: abs(v.heads * v.head_dim - config.get("dim", 0)), default=None)
    base = "a pipeline directory of the same variant" if variant is None else variant.hub_ids[0]
    raise PtqError(
        f"{path} is a Wan checkpoint in its original layout ({', '.join(p.name for p in experts.values())}); a diffusers pipeline is expected. Convert it once, without loading it: python scripts/convert_original_wan.py {path} --base {base} --out NEW_DIRECTORY. Or use {base} directly."
    )


def _original_config(path: Path) -> dict[str, Any]:
    """config.json of a model in the authors' own layout; empty where there is none."""
    file = path / "config.json"
    value = read_json(file) if file.is_file() and not (path / "model_index.json").exists() else {}
    return value if isinstance(value, dict) else {}


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


def _download(model: str, only: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=only))
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
