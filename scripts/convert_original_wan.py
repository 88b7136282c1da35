"""Convert a Wan release in its original layout (or single-file experts) to a diffusers pipeline directory.

python scripts/convert_original_wan.py Wan2.2-T2V-A14B --base Wan-AI/Wan2.2-T2V-A14B-Diffusers --out wan-t2v
python scripts/convert_original_wan.py --transformer high.safetensors --transformer-2 low.safetensors \\
    --base Wan-AI/Wan2.2-T2V-A14B-Diffusers --out wan-t2v

Only the experts are converted. Their names are mapped by diffusers itself (the table behind
`WanTransformer3DModel.from_single_file`), applied to shard headers instead of tensors: the bytes are then streamed from
file to file, so an expert of 57 GB needs no memory and the values cannot change. VAE, text encoder and tokenizer of the
original releases are pickles, which are never opened; they are copied from --base, a directory or a hub id of the same
variant (its own experts are not downloaded).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from huggingface_hub import snapshot_download

from ptq.checkpoint.safetensors_file import TensorEntry, read_header
from ptq.checkpoint.shards import INDEX_NAME, WEIGHTS_NAME, ShardSet, write_component
from ptq.errors import PtqError, UsageError
from ptq.store.files import write_json
from ptq.wan.foreign import find_original
from ptq.wan.layout import read_layout
from ptq.wan.replay import expected_shapes
from ptq.wan.variants import EXPERTS

SAMPLE_BYTES = 4096
"""Of each tensor, to tell whether two sources hold the same expert."""


def convert_original(experts: Mapping[str, Path], base: Path, out: Path) -> Path:
    """Write a pipeline directory with these experts and everything else from `base`.

    Args:
        experts: "transformer" (high noise, or the only one) and "transformer_2" (low noise) -> a folder with shards and
            index, or one .safetensors file; original names, with or without "model.diffusion_model.".
        base: pipeline directory of the same variant; the weights of its experts need not be there.
        out: directory to create; it appears only whole.

    Returns:
        `out`.

    Raises:
        UsageError: `out` exists, the experts are not those of `base`, one is given twice, or they are swapped.
        PtqError: tensors that are not of this model (named), damaged files, full disk.
    """
    layout = read_layout(base)
    if set(experts) != set(layout.experts):
        raise UsageError(f"{base} has {', '.join(layout.experts)}, but found {', '.join(experts)} to convert.")
    if out.exists():
        raise UsageError(f"{out} exists already; choose another directory.")
    _refuse_swapped(experts)
    ordered = {name: _rename(experts[name], config) for name, config in layout.experts.items()}
    if len({_sample_digest(entries) for entries in ordered.values()}) < len(ordered):
        raise UsageError(
            f"{' and '.join(map(str, experts.values()))} hold the same weights; the high-noise and the low-noise expert are two models. Name each once."
        )
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base, partial, ignore=lambda _, names: [n for n in names if n in experts or n.startswith(".")])
    for name, entries in ordered.items():
        write_component(partial / name, entries)
        write_json(partial / name / "config.json", layout.experts[name])
    partial.rename(out)
    return out


def _refuse_swapped(experts: Mapping[str, Path]) -> None:
    """Refuse one source given twice, and names that say the other expert."""
    if len({path.resolve() for path in experts.values()}) < len(experts):
        raise UsageError(
            f"{next(iter(experts.values()))} was given for both experts. Name each one's own file or folder."
        )
    noises = dict(zip(EXPERTS, ("high", "low"), strict=True))
    for expert, path in experts.items() if len(experts) > 1 else ():
        said = {noise for noise in noises.values() if re.search(rf"(^|[^a-z]){noise}([^a-z]|$)", path.name.lower())}
        if len(said) == 1 and noises[expert] not in said:
            raise UsageError(
                f"{path} was given as {expert}, the {noises[expert]}-noise expert, but is called {said.pop()}. --transformer takes the high-noise expert, --transformer-2 the low-noise one."
            )


def _sample_digest(entries: list[TensorEntry]) -> str:
    """Digest over the beginning of every tensor, whatever the files: two experts differ in nearly each."""
    result = hashlib.sha256()
    for entry in entries:
        with open(entry.file, "rb") as handle:
            handle.seek(entry.start)
            result.update(f"{entry.name} {entry.dtype} ".encode() + handle.read(min(entry.nbytes, SAMPLE_BYTES)))
    return result.hexdigest()


def _rename(source: Path, config: dict[str, Any]) -> list[TensorEntry]:
    """The expert's tensors under diffusers' names, in state-dict order."""
    found = _read(source)
    mapping = SINGLE_FILE_LOADABLE_CLASSES["WanTransformer3DModel"]["checkpoint_mapping_fn"]
    renamed: dict[str, TensorEntry] = mapping(checkpoint=dict(found))
    wanted = expected_shapes(config, None)
    missing = [name for name in wanted if name not in renamed]
    unknown = [entry.name for name, entry in renamed.items() if name not in wanted]
    if missing or unknown:
        raise PtqError(
            f"{source} is not the model that the base's config.json describes: {len(missing)} tensors are missing (first: {missing[:1]}) and {len(unknown)} are unknown (first: {unknown[:1]}). Quantized (fp8, GGUF) and merged checkpoints cannot be converted; take the original release."
        )
    for name, shape in wanted.items():
        if renamed[name].shape != shape:
            raise PtqError(
                f"{source}: tensor {renamed[name].name} has shape {list(renamed[name].shape)}, the base's config.json asks for {list(shape)}. Choose the base of the same variant."
            )
    return [replace(renamed[name], name=name) for name in wanted]


def _read(source: Path) -> dict[str, TensorEntry]:
    if source.suffix == ".safetensors":
        return read_header(source)
    if not source.is_dir() or not ((source / INDEX_NAME).exists() or (source / WEIGHTS_NAME).exists()):
        raise PtqError(
            f"{source} holds no safetensors weights ({INDEX_NAME} or {WEIGHTS_NAME} expected). Pickled checkpoints (.pth) are never opened."
        )
    return ShardSet(source).entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", nargs="?", type=Path, help="directory of the original release")
    parser.add_argument("--transformer", type=Path, help="high-noise (or only) expert: folder or .safetensors file")
    parser.add_argument("--transformer-2", type=Path, help="low-noise expert")
    parser.add_argument("--base", required=True, help="diffusers pipeline of the same variant: directory or hub id")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    given = {"transformer": args.transformer, "transformer_2": args.transformer_2}
    experts = {name: path for name, path in given.items() if path is not None}
    if args.release is not None:
        experts = find_original(args.release) | experts
    if not experts:
        parser.error("name a release directory that holds original weights, or --transformer")
    base = Path(args.base)
    if not base.is_dir():
        base = Path(snapshot_download(args.base, ignore_patterns=["transformer*/*.safetensors*"]))
    try:
        print(f"Wrote {convert_original(experts, base, args.out)}")
    except PtqError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
