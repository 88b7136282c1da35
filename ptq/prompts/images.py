"""The picture an image-to-video sample starts from, as pixels: reading it, and the one resize policy.

Policy `cover-center-crop-lanczos`: scale until the target is covered, crop what hangs over equally on both sides,
resample with Lanczos, all in one step. Nothing is stretched and nothing is padded; reference images that are not of the
video's shape lose their edges. Pillow and PyAV are imported on use: listing a prompt file needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ptq import ui
from ptq.errors import DamagedFileError, PtqError
from ptq.limits import CLIP_FRAMES, IMAGE_PIXELS
from ptq.prompts.sample import MediaRef

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

RESIZE_POLICY = "cover-center-crop-lanczos"
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Pillow's names of the formats that are read; no other decoder sees a foreign file (that of EPS starts Ghostscript)."""
ANIMATIONS = ("PNG", "WEBP", "TIFF", "GIF")
"""Of these, several pictures in one file are refused; a camera's MPO (a JPEG) has the picture first and its depth or preview behind."""
CLIPS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,m4v,flv,asf,ogg,h264,hevc"
"""FFmpeg's names of the containers that are read."""
_SHOWN = 200


def load_image(media: MediaRef) -> np.ndarray:
    """The picture a sample starts from, at its own size.

    Returns:
        uint8 [H, W, 3], RGB. Pictures are turned upright by their EXIF orientation (as diffusers' `load_image` does); 16-bit
        greys are scaled to 8 bits, and what is transparent is white.

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
    import struct
    import warnings
    import zlib

    import numpy as np
    from PIL import Image, ImageOps

    # Pillow tells broken files by errors of many kinds, SyntaxError for a broken PNG chunk among them.
    damaged = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, struct.error, zlib.error)
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    Image.init()  # all decoders are known then; those of PICTURES may read
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURES) as picture:
                _refuse_size(path, picture.width, picture.height)
                if picture.format in ANIMATIONS and getattr(picture, "n_frames", 1) > 1:
                    raise DamagedFileError(
                        f"{path} is an animation of several pictures. Save the one that the video starts from as PNG."
                    )
                return np.array(_as_rgb(path, ImageOps.exif_transpose(picture)))
    except (*damaged, *bombs) as error:
        raise DamagedFileError(
            f"{path} cannot be read as a picture ({ui.shorten(str(error), _SHOWN)}). It should be one of {', '.join(PICTURES)}."
        ) from error


def _refuse_size(path: Path, width: int, height: int) -> None:
    if width * height > IMAGE_PIXELS:
        raise DamagedFileError(
            f"{path} has {width} x {height} pixels, more than the {IMAGE_PIXELS / 1e6:.0f} million that are read. Scale it down."
        )


def _as_rgb(path: Path, picture: Image) -> Image:
    """8 bits a channel, without alpha: what is transparent becomes white, 16-bit greys are scaled, others refused by name."""
    from PIL import Image

    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):
        import numpy as np

        levels = np.asarray(picture, np.uint32)
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise DamagedFileError(
            f"{path} has 32-bit {'integers' if mode == 'I' else 'floating point numbers'} as pixels (mode {mode}), and it is not known which of them is white. Save it with 8 or 16 bits a channel."
        )
    if picture.has_transparency_data:
        layers = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return picture.convert("RGB")


def _read_frame(path: Path, index: int) -> np.ndarray:
    """Frame `index` by decoding from the start: exact for any clip, where seeking goes by time stamps that may lie."""
    import av

    if index >= CLIP_FRAMES:
        raise DamagedFileError(f"The prompt file asks for frame {index} of {path}; only {CLIP_FRAMES} are decoded.")
    count = 0
    try:
        # From an open file and only as these containers: playlists and scripts of others name further files and addresses.
        with open(path, "rb") as file, av.open(file, options={"format_whitelist": CLIPS}) as clip:
            if not clip.streams.video:
                raise DamagedFileError(f"{path} has no video stream.")
            stream = clip.streams.video[0]
            _refuse_size(path, stream.codec_context.width, stream.codec_context.height)
            stream.thread_type = "AUTO"
            for count, frame in enumerate(clip.decode(video=0), 1):
                if count > index:
                    _refuse_size(path, frame.width, frame.height)
                    return frame.to_ndarray(format="rgb24")
    except MemoryError:  # PyAV's is an FFmpegError too, and says nothing about the video
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} cannot be decoded as a clip ({ui.shorten(str(error), _SHOWN)}).") from error
    raise DamagedFileError(f"{path} has {count} frames, but the prompt file asks for frame {index} (counted from 0).")
