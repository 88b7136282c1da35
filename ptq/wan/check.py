"""The one check of a model's weights, before anything runs: every component's files, headers, names, shapes, dtypes.

What should be there is asked of the component's own class, built from its configuration on the meta device; what is there
is read from the headers. Nothing is loaded, and pickles are never opened. transformers renames and ties tensors while it
loads, so its own loader gets the headers as tensors on meta and reports what is missing and what it does not know.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import WanTransformer3DModel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from ptq.checkpoint.comparison import FLOATS, check_tensors, refuse_names
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.safetensors_file import TensorEntry
from ptq.checkpoint.shards import TRANSFORMERS_WEIGHTS_NAME, ShardSet
from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import read_json
from ptq.store.schema import parse
from ptq.wan.block import BLOCKS
from ptq.wan.foreign import refuse_quantized
from ptq.wan.layout import ADVICE, ModelLayout
from ptq.wan.replay import expected_tensors
from ptq.wan.schema import TOKENS
from ptq.wan.variants import EXPERTS

LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    NameError,
    ImportError,
    ZeroDivisionError,
    NotImplementedError,
    SafetensorError,
    StrictDataclassError,
)
"""What diffusers and transformers raise about configurations and files that they cannot load."""
MAX_ERROR_CHARS = 300
"""Of their messages, in ours."""
VAE_CLASS = "AutoencoderKLWan"
FILES = {
    "tokenizer": ("tokenizer.json", "spiece.model", "tokenizer.model"),
    "image_processor": ("preprocessor_config.json", "processor_config.json"),
}
"""Component without weights -> files of which it needs one."""


def check_model(layout: ModelLayout) -> None:
    """Refuse a model whose components are not whole and of one piece.

    Raises:
        PtqError: names the component, what was found, what was expected; and the other components with problems.
    """
    problems: dict[str, str] = {}
    for name, (library, kind) in layout.components.items():
        try:
            _check_component(layout, name, library, kind)
        except PtqError as error:
            problems[name] = str(error)
    if not problems and not layout.is_packed:
        problems = _compare_widths(layout)
    if problems:
        first, *others = problems
        also = f" Also with problems: {', '.join(others)}." if others else ""
        raise DamagedFileError(problems[first] + also)


def shorten_error(error: BaseException) -> str:
    """An error of a library as one piece of a sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:MAX_ERROR_CHARS]}{'...' if len(text) > MAX_ERROR_CHARS else ''}"


def _check_component(layout: ModelLayout, name: str, library: str, kind: str) -> None:
    folder = layout.path / name
    if not folder.is_dir():
        raise PtqError(
            f"{layout.path}/model_index.json names {name} ({kind}), but {folder} does not exist. Download or copy the model again."
        )
    if name in FILES:
        if not any((folder / file).is_file() for file in FILES[name]):
            raise PtqError(f"{folder} has none of {', '.join(FILES[name])}. Download or copy the model again.")
        for file, schema in TOKENS.items():
            if (folder / file).is_file():
                parse(schema, read_json(folder / file), folder / file, ADVICE)
        return
    if name == "scheduler":
        _check_scheduler(folder / "scheduler_config.json", _class_of(layout, name, diffusers, kind))
        return
    if name in EXPERTS:
        _check_expert(folder, layout.experts[name])
    elif name == "vae":
        if kind != VAE_CLASS:
            raise PtqError(f"{layout.path}/model_index.json names the vae {kind[:80]}; expected {VAE_CLASS}.")
        _check_vae(folder)
    else:
        _check_encoder(folder, _class_of(layout, name, transformers, kind))


def _class_of(layout: ModelLayout, name: str, library: Any, kind: str) -> Any:
    found = getattr(library, kind, None)
    if not hasattr(found, "from_pretrained"):
        raise PtqError(
            f"{layout.path}/model_index.json names the {name} {kind[:80]}, which the installed {library.__name__} {library.__version__} does not have. Correct the index, or install the version that made the model."
        )
    return found


def _check_scheduler(where: Path, kind: Any) -> None:
    """It is cheap, so it is tried: a schedule whose noise levels are finite and fall."""
    with _named(where):
        scheduler = kind.from_config(read_json(where))
        scheduler.set_timesteps(4)
        sigmas = scheduler.sigmas
        if not (torch.isfinite(sigmas).all() and (sigmas.diff() < 0).all()):
            raise ValueError(f"its noise levels are {sigmas.tolist()}, which do not fall")


def _check_expert(folder: Path, config: dict[str, Any]) -> None:
    entries = ShardSet(folder).entries
    if config.get("quantization_config") is None:
        refuse_quantized(folder, entries)
    blocks = {int(match[1]) for name in entries if (match := re.match(rf"{BLOCKS}\.(\d{{1,9}})\.", name))}
    if blocks and len(blocks) != config["num_layers"]:
        raise DamagedFileError(
            f"{folder}/config.json has num_layers = {config['num_layers']}, but its weights hold {len(blocks)} blocks. The configuration and the weights are not of one model; download or copy it again."
        )
    ignored = WanTransformer3DModel._keys_to_ignore_on_load_unexpected
    check_tensors(folder, entries, _expert_tensors(str(folder), json.dumps(config, sort_keys=True)), ignored)


@functools.lru_cache(maxsize=4)
def _expert_tensors(folder: str, config: str) -> dict[str, Tensor]:
    """Both experts of a model have one structure, and a command asks for it more than once."""
    content = json.loads(config)
    packed = content.get("quantization_config")
    with _named(f"{folder}/config.json"):
        parsed = None if packed is None else PackedConfig.parse(packed, f"{folder}/config.json")
        return expected_tensors(content, parsed)


def _check_vae(folder: Path) -> None:
    entries = ShardSet(folder).entries
    refuse_quantized(folder, entries)
    with _named(folder / "config.json"), torch.device("meta"):
        expected = getattr(diffusers, VAE_CLASS).from_config(read_json(folder / "config.json")).state_dict()
    check_tensors(folder, entries, expected)


def _check_encoder(folder: Path, kind: Any) -> None:
    """A component of transformers, which accepts other names too: prefixes of before, either name of a tied tensor."""
    entries = ShardSet(folder, TRANSFORMERS_WEIGHTS_NAME).entries
    refuse_quantized(folder, entries)
    for entry in entries.values():
        if entry.torch_dtype.is_floating_point and entry.dtype not in FLOATS:
            raise DamagedFileError(
                f"{entry.file}: tensor {entry.name} is {entry.dtype}; expected one of {', '.join(FLOATS)}. Download or copy the model again."
            )
    state = {name: _on_meta(entry) for name, entry in entries.items()}
    with _named(folder / "config.json"), _silent_transformers():
        config = kind.config_class.from_dict(read_json(folder / "config.json"))
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        raise DamagedFileError(
            f"{folder}: tensor {name} is {list(shape)}, but config.json asks for {list(wanted)}. The configuration and the weights are not of one model; download or copy it again."
        )
    refuse_names(folder, sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), len(model.state_dict()))


def _on_meta(entry: TensorEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")


def _compare_widths(layout: ModelLayout) -> dict[str, str]:
    """Component -> what it hands to the experts and they do not take."""
    expert = next(iter(layout.experts.values()))
    handed = {"text_encoder": ("d_model", "text_dim"), "vae": ("z_dim", "out_channels")}
    problems = {}
    for name, (given, taken) in handed.items():
        value = read_json(layout.path / name / "config.json")[given]
        if value != expert[taken]:
            problems[name] = (
                f'{layout.path}/{name}/config.json has "{given}": {value}, but transformer/config.json has "{taken}": {expert[taken]}. The components are not of one model; copy both from one release.'
            )
    return problems


@contextlib.contextmanager
def _named(where: object) -> Iterator[None]:
    """Errors of the libraries about a configuration file, as one paragraph that names it."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise DamagedFileError(
            f"{where} does not describe something that the installed libraries can build: {shorten_error(error)}. Download or copy the model again."
        ) from error


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without its own report and progress: what it finds is told here."""
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
