"""Frames to a verified H.264 file, and the frames beside it.

Untagged 8-bit yuv420p, constant rate factor, one thread, no encoder or muxer text that varies: the same frames give the
same bytes. The settings are constants, because a comparison of two precisions must not see two encoders. Macroblock-tree
rate control is off for that reason: with it, x264's SIMD code reads memory it never wrote, and the same frames gave up to
8 different files in 8 processes that differed in MALLOC_PERTURB_ only (sizes 64x48 to 832x480); without it, always one.
CRF 14 is near what metrics can see; `--save-frames` is there for measures that must see no encoder. PyAV's wheels carry
libx264.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np

from ptq.errors import DamagedFileError
from ptq.store.files import atomic_path, write_bytes

CODEC, PIXEL_FORMAT = "libx264", "yuv420p"
ENCODER_OPTIONS = {
    "crf": "14",
    "preset": "medium",
    "threads": "1",
    "flags": "+bitexact",
    "x264-params": "mbtree=0",
}
_UNTAGGED = 2
"""What ITU-T H.273 calls unspecified."""


def encode_video(frames: np.ndarray, fps: int) -> bytes:
    """Encode uint8 [T, H, W, 3] RGB as an mp4 file in memory (one clip is a few ten MB at 720p)."""
    return encode_stream(frames, fps, (frames.shape[2], frames.shape[1]))


def encode_stream(frames: Iterable[np.ndarray], fps: int, size: tuple[int, int], **options: str) -> bytes:
    """Encode uint8 [H, W, 3] RGB frames, scaled to `size` (width, height); `options` replace those of the encoder.

    Raises:
        DamagedFileError: a frame that the encoder refuses. MemoryError: there is too little memory to encode.
    """
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream(CODEC, rate=fps, options={**ENCODER_OPTIONS, **options})
            stream.width, stream.height, stream.pix_fmt = *size, PIXEL_FORMAT
            stream.thread_count = 1
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except MemoryError:  # PyAV's is an FFmpegError too, and says nothing about the video
        raise
    except av.FFmpegError as error:
        raise DamagedFileError(f"A video could not be encoded ({error}).") from error
    return buffer.getvalue()


def write_video(path: Path, data: bytes, num_frames: int, height: int, width: int) -> None:
    """Write an encoded video atomically; it gets its name only after it was decoded back.

    Raises:
        DamagedFileError: what was written does not decode to the right frames.
        PtqError: the disk is full or not writable.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
        verify_video(temporary, num_frames, height, width)


def verify_video(path: Path, num_frames: int, height: int, width: int) -> None:
    """Decode every frame of a video and compare count, size, pixel format and absence of colour tags.

    Raises:
        DamagedFileError: names the first difference. MemoryError: there is too little memory to decode.
    """
    count = 0
    try:
        # A file object, because a temporary name has no suffix that FFmpeg knows.
        with open(path, "rb") as file, av.open(file, format="mp4") as container:
            context = container.streams.video[0].codec_context
            found = (context.height, context.width, context.pix_fmt)
            if found != (height, width, PIXEL_FORMAT):
                raise DamagedFileError(f"{path} holds {found}, expected {(height, width, PIXEL_FORMAT)}.")
            if (context.color_primaries, context.color_trc, context.colorspace) != (_UNTAGGED,) * 3:
                raise DamagedFileError(f"{path} carries colour tags; generated videos have none.")
            for _ in container.decode(video=0):
                count += 1
    except MemoryError:
        raise
    except (av.FFmpegError, IndexError) as error:
        raise DamagedFileError(f"{path} cannot be decoded ({error}).") from error
    if count != num_frames:
        raise DamagedFileError(f"{path} holds {count} frames, expected {num_frames}.")


def write_frames(path: Path, frames: np.ndarray) -> None:
    """Write uint8 [T, H, W, 3] as "frames" of a compressed npz, atomically and with reproducible bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, frames=frames)
    write_bytes(path, buffer.getvalue())
