"""Streams of RGB frames from saved arrays or from videos, one frame at a time; the image that the first one started from.

Saved frames (`--save-frames`) are preferred where both runs have them: encoding alone costs 42 to 45 dB. Videos are
decoded with PyAV; the frames equal OpenCV's bit for bit (tested on a recorded clip), through which VBench reads videos.
Neither reader holds a whole clip: a 61-frame 720p clip is 169 MB.

Pasting the input image over frame 0 lifts image-conditioned scores without any model having drawn it. A generated first
frame went through the VAE and stays below about 40 dB on real pictures; a copy is equal in saved frames, and loses only
the encoder's 42 to 45 dB in a video.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ptq.errors import DamagedFileError, PtqError
from ptq.evaluation import measures
from ptq.evaluation.runs import Unit
from ptq.limits import IMAGE_PIXELS
from ptq.prompts import MediaRef, fit_image, load_image
from ptq.store.run_manifest import ImageSource

FRAME_BYTES = 3 * IMAGE_PIXELS
SAVED, VIDEO = "saved frames", "decoded video"
COPY_PSNR_IN_VIDEO = 42.0
"""A decoded first frame this close (dB) to the input image is reported as a copy."""


def choose_source(reference: Unit, candidate: Unit) -> str:
    """`SAVED` where both runs kept the unit's frames, else `VIDEO`: both sides always come from the same kind."""
    return SAVED if reference.keeps("saved_frames") and candidate.keeps("saved_frames") else VIDEO


def frames_of(unit: Unit, source: str) -> Iterator[np.ndarray]:
    """Yield the unit's frames, uint8 [H, W, 3] RGB, from `source` (`SAVED` or `VIDEO`).

    Raises:
        DamagedFileError: the file was changed or cannot be read, or holds other frames than the manifest says.
    """
    key = "saved_frames" if source == SAVED else "video"
    path, line, count = unit.directory / str(getattr(unit.line, key)), unit.line, 0
    with unit.open(key) as file:
        for frame in iterate_saved(path, file) if source == SAVED else iterate_video(path, file):
            count += 1
            if count > (line.frames or 0) or frame.shape != (line.height, line.width, 3):
                raise DamagedFileError(
                    f"{path} holds a frame {count} of shape {list(frame.shape)}; the manifest of unit {unit.name} says {line.frames} frames of {line.height} x {line.width}."
                )
            yield frame
    if count != line.frames:
        raise DamagedFileError(f"{path} holds {count} frames; the manifest of unit {unit.name} says {line.frames}.")


def iterate_video(path: Path, file: BinaryIO | None = None) -> Iterator[np.ndarray]:
    """Decode a video file (`file` where it is open already) frame by frame, uint8 [H, W, 3] RGB.

    Raises:
        DamagedFileError: not a readable video.
    """
    import av

    try:
        with nullcontext(file) if file else open(path, "rb") as opened, av.open(opened, format="mp4") as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield frame.to_ndarray(format="rgb24")
    except MemoryError:  # PyAV's is an FFmpegError too, and says nothing about the video
        raise
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise DamagedFileError(f"{path} cannot be decoded as a video ({error}).") from error


def iterate_saved(path: Path, file: BinaryIO | None = None) -> Iterator[np.ndarray]:
    """Stream the array "frames", uint8 [T, H, W, 3], of an .npz file (`file` where it is open already).

    Raises:
        DamagedFileError: not such a file, or truncated.
    """
    try:
        with zipfile.ZipFile(file or path) as archive, archive.open("frames.npy") as member:
            shape = _npy_shape(member, path)
            size = math.prod(shape[1:])
            if size > FRAME_BYTES:
                raise DamagedFileError(f"{path} says that a frame has {size} bytes, more than any has that is read.")
            for _ in range(shape[0]):
                data = member.read(size)
                if len(data) != size:
                    raise DamagedFileError(f"{path} is truncated.")
                yield np.frombuffer(data, np.uint8).reshape(shape[1:])
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, ValueError, OSError, NotImplementedError) as error:
        raise DamagedFileError(f"{path} is not an .npz file with uint8 frames [T, H, W, 3] ({error}).") from error


def _npy_shape(member: Any, path: Path) -> tuple[int, ...]:
    version = np.lib.format.read_magic(member)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(member)
    if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise DamagedFileError(f"{path} holds {dtype} {list(shape)}, expected uint8 [T, H, W, 3] in C order.")
    return tuple(shape)


def input_image(unit: Unit, height: int, width: int) -> np.ndarray | None:
    """The image the model got, uint8 [H, W, 3], made again from its source; None where that is not on this machine.

    The manifest's `image_sha256` is over these pixels: an image that comes out differently is not used (None).
    """
    named, source = Path(str(unit.line.image)), unit.line.image_source or ImageSource()
    path = named if named.is_absolute() else unit.directory / named
    if not path.is_file():
        return None
    media = MediaRef(source.kind, str(named), source.frame, source.crop, path)
    try:
        image = fit_image(load_image(media), height, width)
    except PtqError:
        return None
    same = hashlib.sha256(image.tobytes()).hexdigest() == unit.line.image_sha256
    return image if same else None


def first_frame_measures(frame: np.ndarray, image: np.ndarray, source: str) -> dict[str, float | None]:
    """PSNR (dB) of frame 0 against the input image, both uint8 [H, W, 3], None when equal; `first_frame_copied`: 1 or 0."""
    mse, _ = measures.mean_square_and_abs(frame.astype(np.int16) - image)
    psnr = measures.psnr_from_mse(mse) if mse > 0 else None
    copied = psnr is None or (source != SAVED and psnr >= COPY_PSNR_IN_VIDEO)
    return {"first_frame_to_image_psnr": psnr, "first_frame_copied": float(copied)}
