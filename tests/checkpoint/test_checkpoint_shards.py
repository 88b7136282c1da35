"""ShardSet on single and sharded components, disagreeing index files, and sharding as diffusers does it."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from ptq.checkpoint.safetensors_file import read_header
from ptq.checkpoint.shards import INDEX_NAME, WEIGHTS_NAME, ShardSet, write_component
from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import sha256_file

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
}


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**SMALL)


@pytest.fixture
def sharded(model: WanTransformer3DModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size=100_000)
    return tmp_path / "sharded"


@pytest.mark.parametrize("max_bytes", [30_000, 100_000, 400_000, 10**9])
def test_shards_are_those_that_diffusers_writes(model: WanTransformer3DModel, tmp_path: Path, max_bytes: int) -> None:
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_bytes)
    theirs = ShardSet(tmp_path / "theirs")
    write_component(tmp_path / "ours", [theirs.entries[name] for name in model.state_dict()], max_bytes)
    expected = [f.name for f in theirs.files]
    found = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    if max_bytes == 10**9:  # an index is written even for one shard
        assert (expected, found) == ([WEIGHTS_NAME], ["diffusion_pytorch_model-00001-of-00001.safetensors"])
    else:
        assert found == expected and len(found) > 1
        index = json.loads((tmp_path / "theirs" / INDEX_NAME).read_text())
        assert json.loads((tmp_path / "ours" / INDEX_NAME).read_text())["weight_map"] == index["weight_map"]
    for ours, other in zip(found, expected, strict=True):
        assert sha256_file(tmp_path / "ours" / ours) == sha256_file(tmp_path / "theirs" / other)


def test_index_carries_the_checksum_of_every_tensor(sharded: Path, tmp_path: Path) -> None:
    source = ShardSet(sharded)
    write_component(tmp_path / "out", list(source.entries.values()), 10**9)
    metadata = json.loads((tmp_path / "out" / INDEX_NAME).read_text())["metadata"]
    expected = {name: zlib.crc32(source.read(name).numpy().tobytes()) for name in source.entries}
    assert metadata["ptq_crc32"] == expected
    assert metadata["total_size"] == sum(entry.nbytes for entry in source.entries.values())


def test_reading_from_one_and_from_many_files(model: WanTransformer3DModel, sharded: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "single")
    many, one = ShardSet(sharded), ShardSet(tmp_path / "single")
    assert len(many.files) > 2 and len(one.files) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(many.read(name), value) and torch.equal(one.read(name), value)
    prefix = many.read_prefix("blocks.1.")
    assert set(prefix) == set(model.blocks[1].state_dict())
    with pytest.raises(PtqError, match=r"no tensor blocks\.7\.nothing"):
        one.read("blocks.7.nothing")


def test_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(PtqError, match=gone.name):
        ShardSet(sharded)


def test_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match="has neither"):
        ShardSet(tmp_path)


def edit_index(directory: Path, change) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    index = change(index) or index
    (directory / INDEX_NAME).write_text(json.dumps(index))


def test_index_that_lists_an_absent_tensor(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, lambda index: index["weight_map"].update({"ghost.weight": file}))
    with pytest.raises(DamagedFileError, match=r"ghost\.weight"):
        ShardSet(sharded)


def test_index_that_places_a_tensor_in_another_shard(sharded: Path) -> None:
    other = sorted(sharded.glob("*.safetensors"))[-1].name
    edit_index(sharded, lambda index: index["weight_map"].update({"patch_embedding.weight": other}))
    with pytest.raises(DamagedFileError, match=rf"patch_embedding\.weight, which .* places in {other}"):
        ShardSet(sharded)


def test_shard_with_a_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop("proj_out.bias") and None)
    with pytest.raises(DamagedFileError, match=r"proj_out\.bias"):
        ShardSet(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = next(iter(read_header(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    with pytest.raises(DamagedFileError) as caught:
        ShardSet(sharded)
    assert name in str(caught.value)


@pytest.mark.parametrize("content", [{}, [], {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_index_of_another_shape(sharded: Path, content: object) -> None:
    (sharded / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match="weight_map"):
        ShardSet(sharded)


def test_shard_outside_the_directory_is_refused(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    sorted(sharded.glob("*.safetensors"))[0].rename(outside)
    edit_index(sharded, lambda index: {"weight_map": dict.fromkeys(read_header(outside), "../outside.safetensors")})
    with pytest.raises(DamagedFileError):
        ShardSet(sharded)
