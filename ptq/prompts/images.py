"""The picture an image-to-video sample starts from, as pixels: reading it, and the one resize policy.

Policy `cover-center-crop-lanczos`: scale until the target is covered, crop what hangs over equally on both sides,
resample with Lanczos, all in one step. Nothing is stretched and nothing is padded; reference images that are not of the
video's shape lose their edges. Pillow and PyAV are imported on use: listing a prompt file needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ptq.errors import DamagedFileError, PtqError
from ptq.prompts.sample import MediaRef

if TYPE_CHECKING:
    import numpy as np

RESIZE_POLICY = "cover-center-crop-lanczos"


def load_image(media: MediaRef) -> np.ndarray:
    """The picture a sample starts from, at its own size.

    Returns:
        uint8 [H, W, 3], RGB. Pictures are turned upright by their EXIF orientation (as diffusers' `load_image` does).

    Raises:
        PtqError: the file is not on this machine.
        DamagedFileError: it is no picture or clip, ends before the frame, or is smaller than the crop.
    """
    if media.resolved is None:
        raise PtqError(f"{media.path} was not found. Name the folder that holds it with --media-root.")
    if media.kind == "image":
        return _read_picture(media.resolved)
    frame = _read_frame(media.resolved, media.frame)
    if media.crop is None:
        return frame
    x0, x1, y0, y1 = media.crop
    height, width = frame.shape[:2]
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise DamagedFileError(
            f"{media.resolved} is {width} x {height} pixels, but the prompt file crops x {x0}-{x1}, y {y0}-{y1}. Is it the clip the file was made for?"
        )
    return frame[y0:y1, x0:x1].copy()


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bring a picture to the video's size by the policy `RESIZE_POLICY`; an exact copy where it already has it.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [height, width, 3].
    """
    import numpy as np
    from PIL import Image, ImageOps

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 [H, W, 3], found {image.dtype} {list(image.shape)}")
    fitted = ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS)
    return np.array(fitted)


def _read_picture(path: Path) -> np.ndarray:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow: SyntaxError for a broken PNG chunk
        raise DamagedFileError(f"{path} cannot be read as a picture ({error}).") from error


def _read_frame(path: Path, index: int) -> np.ndarray:
    """Frame `index` by decoding from the start: exact for any clip, where seeking goes by time stamps that may lie."""
    import av

    count = 0
    try:
        with av.open(str(path)) as clip:
            if not clip.streams.video:
                raise DamagedFileError(f"{path} has no video stream.")
            clip.streams.video[0].thread_type = "AUTO"
            for count, frame in enumerate(clip.decode(video=0), 1):
                if count > index:
                    return frame.to_ndarray(format="rgb24")
    except MemoryError:  # PyAV's is an FFmpegError too, and says nothing about the video
        raise
    except av.FFmpegError as error:
        raise DamagedFileError(f"{path} cannot be decoded as a clip ({error}).") from error
    raise DamagedFileError(f"{path} has {count} frames, but the prompt file asks for frame {index} (counted from 0).")
