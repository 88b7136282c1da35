"""What a path is where it is no pipeline of this package: who made it, and what to pass instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq.errors import PtqError
from ptq.store.files import read_json
from ptq.wan.variants import EXPERTS, SUPPORTED, VARIANTS, relative_of

if TYPE_CHECKING:
    from ptq.checkpoint.safetensors_file import TensorEntry

METHODS = {
    "bitsandbytes": "bitsandbytes",
    "gguf": "GGUF",
    "torchao": "torchao",
    "quanto": "Quanto",
    "svdq": "Nunchaku (SVDQuant)",
    "nunchaku": "Nunchaku (SVDQuant)",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "NVIDIA ModelOpt",
    "fp8": "an fp8 tool",
}
"""Part of a `quant_method` -> the tool for people."""
TENSOR_MARKS = {
    r"\.(absmax|quant_map|nested_absmax|SCB)$|quant_state\.bitsandbytes": "bitsandbytes",
    r"\.(wscales|wtscale|smooth_factor|smooth_factor_orig|smooth_orig|proj_down|proj_up)$": "Nunchaku (SVDQuant)",
    r"_amax$|\.(weight|input|output)_quantizer|\.weight_scale_2$": "NVIDIA ModelOpt",
    r"\.(weight_packed|weight_shape|weight_global_scale)$": "compressed-tensors, or by `ptq quantize` and lost its quantization_config",
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"qdata$|tensor_impl": "torchao",
    r"\._data$|\._scale$": "Quanto",
    r"(^|\.)(scaled_fp8|comfy_quant|scale_weight|scale_input|weight_scale|weight_scale_inv|input_scale)$": "an fp8 tool, with scales beside the weights (as ComfyUI reads them)",
}
"""Pattern of a tensor's name -> the tool that writes such tensors beside the weights; the first that fits counts."""
ORIGINAL_FOLDERS = dict(zip(EXPERTS, ("high_noise_model", "low_noise_model"), strict=True))
"""Expert -> its folder in a release of two experts in the authors' own layout."""
ORIGINAL_CLASS = "WanModel"
"""Class name in the config.json of such a release."""
ORIGINAL_TENSOR = r"(^|\.)blocks\.0\.self_attn\.q\.weight$"
"""A tensor that every file in the authors' own names has, with or without a prefix."""
WEIGHT_FILES = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt", ".bin", ".sft")


def refuse_method(where: object, quantization: object) -> None:
    """Refuse a component that a `quantization_config` says another tool quantized.

    Raises:
        PtqError: names the tool.
    """
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    named = next((tool for part, tool in METHODS.items() if part in str(method).lower()), None)
    _refuse_quantized(where, named or f"a tool that calls itself {str(method)[:40]!r} (quant_method)")


def refuse_quantized(where: object, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse an unpacked component whose tensors show that another tool quantized it.

    Raises:
        PtqError: names the tool, or the dtype of weights that were only cast.
    """
    for pattern, tool in TENSOR_MARKS.items():
        mark = next((name for name in entries if re.search(pattern, name)), None)
        if mark is not None:
            _refuse_quantized(where, f"{tool}: it holds {mark}")
    cast = [entry for entry in entries.values() if entry.dtype.startswith("F8")]
    if cast:
        _refuse_quantized(where, f"a cast to {cast[0].dtype} ({len(cast)} tensors, first {cast[0].name})")


def _refuse_quantized(where: object, tool: str) -> None:
    raise PtqError(
        f"{where} was quantized by {tool}; its weights are no longer the original's. Pass the unquantized model (float32, float16 or bfloat16), for instance {next(iter(VARIANTS.values())).hub_ids[0]}."
    )


def find_original(path: Path) -> dict[str, Path]:
    """Expert name -> folder of a release in the authors' own layout; empty where `path` is none.

    Args:
        path: a release directory (`high_noise_model/` and `low_noise_model/`, or one model at the top).
    """
    experts = {name: path / folder for name, folder in ORIGINAL_FOLDERS.items() if (path / folder).is_dir()}
    if len(experts) == len(ORIGINAL_FOLDERS):
        return experts
    return {"transformer": path} if _config(path).get("_class_name") == ORIGINAL_CLASS else {}


def refuse_relative(path: Path, *names: Any) -> None:
    """Refuse a relative of the family that class names, configuration keys or a model type give away.

    Raises:
        PtqError: it is one; names it.
    """
    relative = relative_of(*names)
    if relative is not None:
        raise PtqError(
            f"{path} is a Wan {relative} model, which has blocks or inputs that are not known here and would be left out. {SUPPORTED}."
        )


def refuse_no_pipeline(path: Path, name: str | None = None, files: Iterable[str] = ()) -> None:
    """Say what a file, or a directory without model_index.json, is, and what to pass instead.

    Args:
        name: how the user named it, where that is not the path.
        files: of a hub repository, those that were not fetched.

    Raises:
        PtqError: always.
    """
    if path.is_file():
        _refuse_file(path)
    _refuse_original(path)
    title, parent = name or str(path), path.absolute().parent
    for inner in (path.absolute(), parent):
        if (inner.parent / "model_index.json").is_file():
            raise PtqError(
                f"{title} is one component of the pipeline {inner.parent}. Pass the pipeline, the directory with model_index.json: {inner.parent}."
            )
    found = sorted({*files, *(file.name for file in path.iterdir() if file.is_file())})
    gguf = next((file for file in found if file.endswith(".gguf")), None)
    if gguf is not None:
        _refuse_quantized(title, f"GGUF: it holds {gguf}")
    weights = next((file for file in found if file.endswith(WEIGHT_FILES)), None)
    shown = "" if weights is None else f" It holds weights of another layout ({weights})."
    raise PtqError(
        f"{title} is not a diffusers pipeline directory (no model_index.json).{shown} Expected a pipeline of Wan 2.2 or 2.1 in diffusers layout, a hub id such as Wan-AI/Wan2.2-T2V-A14B-Diffusers, or `tiny`."
    )


def _refuse_file(path: Path) -> None:
    """A file is never a model: one expert, a pipeline's part, or something else."""
    from ptq.checkpoint.safetensors_file import read_header

    if path.name == "model_index.json":
        raise PtqError(f"{path} is the index of a pipeline; pass its directory, {path.absolute().parent}.")
    for folder in path.absolute().parents[:2]:
        if (folder / "model_index.json").is_file():
            raise PtqError(f"{path} is one file of the pipeline {folder}; pass that directory.")
    if path.suffix == ".gguf":
        _refuse_quantized(path, "GGUF")
    if path.suffix not in WEIGHT_FILES:
        raise PtqError(f"{path} is a file and no model. Pass a pipeline directory of Wan 2.2 or 2.1, or a hub id.")
    if path.suffix != ".safetensors":
        raise PtqError(
            f"{path} is a pickle, which runs code when it is opened and is never opened here. Pass a pipeline directory with safetensors weights, for instance Wan-AI/Wan2.2-T2V-A14B-Diffusers."
        )
    entries = read_header(path)
    refuse_quantized(path, entries)
    command = f"python scripts/convert_original_wan.py --transformer {path} --base PIPELINE --out NEW_DIRECTORY"
    original = any(re.search(ORIGINAL_TENSOR, name) for name in entries)
    advice = f" It has the names of the original layout; convert it once: {command}." if original else ""
    raise PtqError(
        f"{path} is a single file of weights; a pipeline also needs configurations, text encoder, tokenizer and VAE.{advice} Or pass a pipeline directory, the one with model_index.json."
    )


def _refuse_original(path: Path) -> None:
    """Say how to convert where a user passes a release in the authors' own layout."""
    experts = find_original(path)
    config = _config(next(iter(experts.values()), path))
    refuse_relative(path, config.get("_class_name"), config.get("model_type"))
    if not experts:
        return
    fitting = [v for v in VARIANTS.values() if (len(v.experts), v.in_channels) == (len(experts), config.get("in_dim"))]
    dim = config.get("dim", 0)
    dim = dim if isinstance(dim, int) else 0
    variant = min(fitting, key=lambda v: abs(v.heads * v.head_dim - dim), default=None)
    base = "a pipeline directory of the same variant" if variant is None else variant.hub_ids[0]
    raise PtqError(
        f"{path} is a Wan checkpoint in its original layout ({', '.join(p.name for p in experts.values())}); a diffusers pipeline is expected. Convert it once, without loading it: python scripts/convert_original_wan.py {path} --base {base} --out NEW_DIRECTORY. Or use {base} directly."
    )


def _config(path: Path) -> dict[str, Any]:
    """config.json of a model in the authors' own layout; empty where there is none."""
    file = path / "config.json"
    value = read_json(file) if file.is_file() and not (path / "model_index.json").exists() else {}
    return value if isinstance(value, dict) else {}
