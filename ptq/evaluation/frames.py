"""Streams of RGB frames from saved arrays or from videos, one frame at a time.

Saved frames (`--save-frames`) are preferred where both runs have them: encoding alone costs 42 to 45 dB. Videos are
decoded with PyAV; the frames equal OpenCV's bit for bit (tested on a recorded clip), through which VBench reads videos.
Neither reader holds a whole clip: a 61-frame 720p clip is 169 MB.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ptq.errors import DamagedFileError
from ptq.evaluation.runs import Unit

SAVED, VIDEO = "saved frames", "decoded video"


def choose_source(reference: Unit, candidate: Unit) -> str:
    """`SAVED` where both runs kept the unit's frames, else `VIDEO`: both sides always come from the same kind."""
    saved = [unit.optional_file("saved_frames") for unit in (reference, candidate)]
    return SAVED if all(saved) else VIDEO


def frames_of(unit: Unit, source: str) -> Iterator[np.ndarray]:
    """Yield the unit's frames, uint8 [H, W, 3] RGB, from `source` (`SAVED` or `VIDEO`).

    Raises:
        DamagedFileError: the file cannot be read, or holds another number of frames than the manifest says.
    """
    path = unit.optional_file("saved_frames") if source == SAVED else unit.video
    if path is None:
        raise ValueError(f"unit {unit.name} has no saved frames")
    count = 0
    for frame in iterate_saved(path) if source == SAVED else iterate_video(path):
        count += 1
        yield frame
    expected = unit.record.get("frames")
    if count == 0 or (expected is not None and count != int(expected)):
        raise DamagedFileError(f"{path} holds {count} frames; the manifest of unit {unit.name} says {expected}.")


def iterate_video(path: Path) -> Iterator[np.ndarray]:
    """Decode a video file frame by frame, uint8 [H, W, 3] RGB.

    Raises:
        DamagedFileError: not a readable video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:
        raise DamagedFileError(f"{path} cannot be decoded as a video ({error}).") from error


def iterate_saved(path: Path) -> Iterator[np.ndarray]:
    """Stream the array "frames", uint8 [T, H, W, 3], of an .npz file.

    Raises:
        DamagedFileError: not such a file, or truncated.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("frames.npy") as member:
            shape = _npy_shape(member, path)
            size = int(np.prod(shape[1:]))
            for _ in range(shape[0]):
                data = member.read(size)
                if len(data) != size:
                    raise DamagedFileError(f"{path} is truncated.")
                yield np.frombuffer(data, np.uint8).reshape(shape[1:])
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        raise DamagedFileError(f"{path} is not an .npz file with uint8 frames [T, H, W, 3] ({error}).") from error


def _npy_shape(member: Any, path: Path) -> tuple[int, ...]:
    version = np.lib.format.read_magic(member)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(member)
    if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise DamagedFileError(f"{path} holds {dtype} {list(shape)}, expected uint8 [T, H, W, 3] in C order.")
    return tuple(shape)


class ContentHash:
    """SHA-256 over the pixels of a stream: equal for two clips exactly when they show the same frames."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, frame: np.ndarray) -> None:
        self._hash.update(repr(frame.shape).encode())
        self._hash.update(np.ascontiguousarray(frame).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
