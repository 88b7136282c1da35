"""The streaming safetensors writer against the library, and the header check against malformed files."""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ptq.checkpoint.safetensors_file import DTYPES, TensorEntry, read_header, tensor_crc32, write_from_entries
from ptq.errors import DamagedFileError, PtqError

NAMES = st.text(alphabet='ab.Z_09é"\\\n ', min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 5), max_size=3)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=8)


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.integers(1, 3))
def test_streamed_bytes_are_those_of_the_library(declared: dict[str, tuple[str, list[int]]], parts: int) -> None:
    tensors = {
        name: random_tensor(getattr(torch, DTYPES[dtype][0]), shape, seed)
        for seed, (name, (dtype, shape)) in enumerate(declared.items())
    }
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        entries: dict[str, TensorEntry] = {}
        for part in range(parts):
            names = list(tensors)[part::parts]
            save_file({name: tensors[name] for name in names}, root / f"part{part}.safetensors")
            entries.update(read_header(root / f"part{part}.safetensors"))
        checksums = write_from_entries(root / "streamed.safetensors", (entries[name] for name in tensors))
        save_file(tensors, root / "library.safetensors", metadata={"format": "pt"})
        assert (root / "streamed.safetensors").read_bytes() == (root / "library.safetensors").read_bytes()
        for name, tensor in tensors.items():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            assert checksums[name] == zlib.crc32(raw) == tensor_crc32(tensor)


def build(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(start: int, stop: int, shape: list, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = {"__metadata__": {"format": "pt"}, "first": tensor(0, 8, [8]), "second": tensor(8, 16, [2], "F32")}

MALFORMED = {
    "empty file": (b"", None),
    "cut in the length": (build(GOOD)[:5], None),
    "cut in the header": (build(GOOD)[:40], None),
    "cut in the data": (build(GOOD)[:-1], "second"),
    "cut in the first tensor": (build(GOOD)[:-12], "first"),
    "bytes after the end": (build(GOOD, b"\0" * 17), None),
    "length beyond the file": ((2**62).to_bytes(8, "little") + b"{}", None),
    "not JSON": (build(b"\xff\xfe garbage"), None),
    "not an object": (build([1, 2, 3]), None),
    "a number": (build(b"17"), None),
    "nested beyond all reason": (build(b"[" * 200_000), None),
    "overlap": (build(GOOD | {"second": tensor(4, 12, [8])}), "second"),
    "a gap": (build({"first": tensor(0, 4, [4]), "second": tensor(8, 16, [8])}), "second"),
    "a hidden tensor": (build({"__first": tensor(0, 8, [8]), "second": tensor(4, 16, [12])}), "second"),
    "negative start": (build({"first": tensor(-8, 8, [16])}), "first"),
    "wrong size": (build(GOOD | {"second": tensor(8, 16, [3], "F32")}), "second"),
    "negative shape": (build(GOOD | {"second": tensor(8, 16, [-2, -1], "F32")}), "second"),
    "fractional shape": (build(GOOD | {"second": tensor(8, 16, [2.0], "F32")}), "second"),
    "shape of text": (build(GOOD | {"second": tensor(8, 16, ["2"], "F32")}), "second"),
    "unknown dtype": (build(GOOD | {"second": tensor(8, 16, [2], "F33")}), "second"),
    "offsets of text": (build(GOOD | {"second": {"dtype": "U8", "shape": [8], "data_offsets": "ab"}}), "second"),
    "no offsets": (build(GOOD | {"second": {"dtype": "U8", "shape": [8]}}), "second"),
    "entry is a list": (build(GOOD | {"second": [1]}), "second"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, tensor_name = MALFORMED[case]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    if tensor_name is not None:
        assert f"tensor {tensor_name} " in str(caught.value)


def test_well_formed_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(build(GOOD))
    entries = read_header(path)
    assert {name: (e.dtype, e.shape, e.nbytes) for name, e in entries.items()} == {
        "first": ("U8", (8,), 8),
        "second": ("F32", (2,), 8),
    }
    assert load_file(path)["second"].shape == (2,)  # the test's own files are what the library accepts


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=r"nowhere\.safetensors"):
        read_header(tmp_path / "nowhere.safetensors")


def test_source_that_shrinks_while_copying_leaves_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.arange(100), "b": torch.arange(100)}, tmp_path / "source.safetensors")
    entries = read_header(tmp_path / "source.safetensors")
    with open(tmp_path / "source.safetensors", "rb+") as handle:
        handle.truncate(1000)
    with pytest.raises(DamagedFileError, match=r"source\.safetensors is truncated: tensor b"):
        write_from_entries(tmp_path / "target.safetensors", entries.values())
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]
