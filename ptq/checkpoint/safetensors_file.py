"""Safetensors files without loading them: validated headers, and a writer that streams from other files.

Why not only the safetensors library: it maps a file and trusts its caller about what should be inside, and its writer
needs every tensor in memory. Here a header is checked completely (offsets, sizes, end of file) before anything is
allocated, and a 5 GB shard is assembled from parts with a few megabytes of memory. The bytes written equal those of
`safetensors.torch.save_file` for the same tensors (tested), so saving a loaded checkpoint again changes nothing.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from ptq import ui
from ptq.errors import DamagedFileError, PtqError, shown
from ptq.limits import JSON_BYTES
from ptq.store.files import atomic_path
from ptq.store.schema import Count, Schema, problems
from ptq.store.strict_json import parse_json

if TYPE_CHECKING:
    import torch

DTYPES: dict[str, tuple[str, int]] = {
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Name in a header -> (name in torch, bytes of an element). The library stores wide dtypes first (so that data stay aligned), then sorts by name."""
DTYPE_ORDER = {name: rank for rank, name in enumerate(DTYPES)}
MAX_DIMENSIONS = 8
"""Of a tensor; a convolution has five."""
COPY_CHUNK = 8 * 2**20


class _Entry(Schema):
    """What a header says of one tensor."""

    dtype: Literal[tuple(DTYPES)]  # type: ignore[valid-type]
    shape: tuple[Count, ...] = Field(strict=False, max_length=MAX_DIMENSIONS)
    data_offsets: tuple[Count, Count] = Field(strict=False)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes are: `dtype` is the safetensors name, `start` the absolute offset in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype][0])
        return dtype


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """All tensors of a safetensors file, from its header alone.

    Raises:
        PtqError: the file does not exist.
        DamagedFileError: truncated file, broken header, overlapping or misplaced tensors; names file and tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise PtqError(f"{path} does not exist, although the checkpoint's index lists it. Download or copy it again.")
    size = path.stat().st_size
    with open(path, "rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(JSON_BYTES, size - 8):
            raise DamagedFileError(
                f"{path} is not a complete safetensors file: its header should have {length} bytes, the file has {size}. Download or copy it again."
            )
        try:
            header = parse_json(handle.read(length))
            if not isinstance(header, dict):
                raise ValueError(f"a JSON object is expected, found {type(header).__name__}")
        except ValueError as error:
            raise DamagedFileError(f"{path} has a damaged safetensors header ({error}).") from error
    header.pop("__metadata__", None)
    entries = {name: _parse_entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries


def _parse_entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    try:
        found = _Entry.model_validate(value)
    except ValidationError as error:
        raise DamagedFileError(
            f"{path}: the header entry of tensor {ui.shorten(name, 200)} is damaged ({problems(error)}). Download or copy it again."
        ) from error
    dtype, shape, (start, stop) = found.dtype, found.shape, found.data_offsets
    entry = TensorEntry(name, dtype, shape, path, data_start + start)
    if entry.nbytes != stop - start:
        raise DamagedFileError(
            f"{path}: tensor {name} is declared as {dtype} {shown(list(shape))} but has {stop - start} bytes of data."
        )
    return entry


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            raise DamagedFileError(f"{path}: tensor {entry.name} starts at byte {entry.start}, expected {position}.")
        position += entry.nbytes
        if position > size:
            raise DamagedFileError(
                f"{path} is truncated: tensor {entry.name} ends at byte {position}, the file has {size}. Download or copy it again."
            )
    if position != size:
        raise DamagedFileError(f"{path} has {size - position} bytes after its last tensor; it was edited or damaged.")


def write_from_entries(path: str | Path, entries: Iterable[TensorEntry]) -> dict[str, int]:
    """Write a safetensors file by copying tensors from other files, atomically.

    Returns:
        CRC-32 of each tensor's bytes.

    Raises:
        PtqError: disk full or not writable.
        DamagedFileError: a source file ended early.
    """
    ordered = sorted(entries, key=lambda e: (DTYPE_ORDER[e.dtype], e.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in ordered:
        offsets = [position, position + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    with atomic_path(path) as temporary, open(temporary, "wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            checksums[entry.name] = _copy(entry, output)
    return checksums


def _copy(entry: TensorEntry, output) -> int:
    checksum, left = 0, entry.nbytes
    with open(entry.file, "rb") as source:
        source.seek(entry.start)
        while left:
            chunk = source.read(min(COPY_CHUNK, left))
            if not chunk:
                raise DamagedFileError(f"{entry.file} is truncated: tensor {entry.name} lacks {left} bytes.")
            checksum = zlib.crc32(chunk, checksum)
            output.write(chunk)
            left -= len(chunk)
    return checksum


def tensor_crc32(tensor: torch.Tensor) -> int:
    """CRC-32 of a CPU tensor's bytes in memory order (as stored in a file)."""
    import torch

    flat = tensor.contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
