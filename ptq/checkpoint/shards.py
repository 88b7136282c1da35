"""One component directory (transformer/): reading tensors from any sharding, writing the final shards and index.

Tensors are located from validated headers and read one at a time, so a model larger than memory is never loaded whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field

from ptq.checkpoint.safetensors_file import TensorEntry, read_header, write_from_entries
from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import read_json
from ptq.store.schema import Count, Number, PlainName, Schema, parse

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
TRANSFORMERS_WEIGHTS_NAME = "model.safetensors"
"""What the components of transformers call their weights; the index beside is called likewise."""
SHARD_NAME = "diffusion_pytorch_model-{index:05d}-of-{count:05d}.safetensors"
MAX_SHARD_BYTES = 5_000_000_000


class ShardMetadata(Schema):
    """What is read of an index beside its names. ptq_crc32: of each tensor, in checkpoints of this package."""

    model_config = ConfigDict(extra="ignore")

    total_size: Number | None = None
    ptq_crc32: dict[str, Count] = Field(default={})


class ShardIndex(Schema):
    """`*.safetensors.index.json`: tensor -> the file beside it that holds it."""

    model_config = ConfigDict(extra="ignore")

    metadata: ShardMetadata = ShardMetadata()
    weight_map: dict[str, PlainName] = Field(min_length=1)


def read_index(path: Path) -> ShardIndex:
    """Read the index of a component.

    Raises:
        PtqError: it does not exist. DamagedFileError: it is no such index.
    """
    return parse(
        ShardIndex,
        read_json(path),
        path,
        "An index has a `weight_map` from tensor names to names of files beside it; copy it again, with its shards.",
    )


class ShardSet:
    """The tensors of one component, across its shards.

    Args:
        directory: a component directory with an index and shards, or a single safetensors file.
        weights_name: of the single file; the index is called after it.

    Raises:
        PtqError: no safetensors weights, or a shard named by the index is missing.
        DamagedFileError: a shard is damaged, the index and the shards disagree, or there are two sets of weights.
    """

    def __init__(self, directory: str | Path, weights_name: str = WEIGHTS_NAME) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, TensorEntry] = {}
        single, index = self.directory / weights_name, self.directory / f"{weights_name}.index.json"
        if index.exists() and single.exists():
            raise DamagedFileError(
                f"{self.directory} holds {index.name}, which names shards, and {single.name} beside it: two sets of weights, of which libraries take the one or the other. Remove the one that is not meant."
            )
        if index.exists():
            self.entries = _read_shards(index)
        elif single.exists():
            self.entries = read_header(single)
        else:
            raise PtqError(
                f"{self.directory} has neither {index.name} nor {single.name}. A component with safetensors weights is expected; pickled ones (.bin, .pth, .ckpt) are never opened. Download the model again, or convert it with diffusers first."
            )
        self.files = sorted({entry.file for entry in self.entries.values()})

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype, on the CPU.

        Raises:
            PtqError: the checkpoint has no such tensor.
        """
        from safetensors import safe_open

        entry = self.entries.get(name)
        if entry is None:
            raise PtqError(f"{self.directory} has no tensor {name}; the checkpoint is incomplete or of another model.")
        with safe_open(entry.file, framework="pt") as handle:
            return handle.get_tensor(name)

    def read_prefix(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names start with `prefix`, with the prefix removed."""
        names = [name for name in self.entries if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.read(name) for name in names}


def _read_shards(index_path: Path) -> dict[str, TensorEntry]:
    weight_map = read_index(index_path).weight_map
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in read_header(index_path.parent / file).items():
            if weight_map.get(name) != entry.file.name:
                raise DamagedFileError(
                    f"{entry.file} holds tensor {name}, which {index_path.name} places in {weight_map.get(name)}. The index and the shards are not of one checkpoint; copy both again."
                )
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise DamagedFileError(f"{index_path} places tensor {name} in {file}, which does not hold it.")
    return entries


def write_component(directory: str | Path, ordered: Sequence[TensorEntry], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write shards and index from tensors in other files, in the order in which diffusers would split them.

    Args:
        ordered: every tensor of the component in state-dict order, with its final name.
        max_bytes: upper limit of one shard.

    The index is written even for a single shard (so that a loader sees file names before it opens them) and carries a
    CRC-32 of every tensor under `metadata.ptq_crc32`.
    """
    from huggingface_hub.serialization._base import split_state_dict_into_shards_factory

    directory = Path(directory)
    split = split_state_dict_into_shards_factory(
        {entry.name: entry for entry in ordered},
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="{suffix}",
        max_shard_size=max_bytes,
    )
    by_name = {entry.name: entry for entry in ordered}
    weight_map: dict[str, str] = {}
    checksums: dict[str, int] = {}
    groups: Iterable[list[str]] = split.filename_to_tensors.values()
    for index, names in enumerate(groups, 1):
        file = SHARD_NAME.format(index=index, count=len(split.filename_to_tensors))
        checksums.update(write_from_entries(directory / file, (by_name[name] for name in names)))
        weight_map.update(dict.fromkeys(names, file))
    total = sum(entry.nbytes for entry in ordered)
    metadata = ShardMetadata(total_size=total, ptq_crc32=dict(sorted(checksums.items())))
    ShardIndex(metadata=metadata, weight_map=dict(sorted(weight_map.items()))).write(directory / INDEX_NAME)
