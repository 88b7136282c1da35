"""Image-to-video: how close the first generated frame is to the input image, and whether it is a pasted copy.

Pasting the input image over frame 0 lifts image-conditioned scores without any model having drawn it. A generated first
frame went through the VAE and stays below about 40 dB on real pictures; a copy is equal in saved frames, and loses only
the encoder's 42 to 45 dB in a video.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from ptq.errors import PtqError
from ptq.evaluation import measures
from ptq.evaluation.frames import SAVED
from ptq.evaluation.runs import Unit

#: A decoded first frame this close (dB) to the input image is reported as a copy.
COPY_PSNR_IN_VIDEO = 42.0


def input_image(unit: Unit, height: int, width: int) -> np.ndarray | None:
    """The image the model got, uint8 [H, W, 3], made again from its source; None where that is not on this machine.

    The manifest's `image_sha256` is over these pixels: an image that comes out differently is not used (None).
    """
    from ptq.prompts import MediaRef, fit_image, load_image

    named, source = Path(str(unit.record["image"])), unit.record.get("image_source") or {}
    path = named if named.is_absolute() else unit.directory / named
    if not path.is_file():
        return None
    crop = tuple(source["crop"]) if source.get("crop") else None
    media = MediaRef(source.get("kind", "image"), str(named), source.get("frame", 0), crop, path)
    try:
        image = fit_image(load_image(media), height, width)
    except PtqError:
        return None
    same = hashlib.sha256(image.tobytes()).hexdigest() == unit.record.get("image_sha256")
    return image if same else None


def first_frame_measures(frame: np.ndarray, image: np.ndarray, source: str) -> dict[str, float | None]:
    """PSNR (dB) of frame 0 against the input image, both uint8 [H, W, 3], None when equal; `first_frame_copied`: 1 or 0."""
    mse, _ = measures.mean_square_and_abs(frame.astype(np.int16) - image)
    psnr = measures.psnr_from_mse(mse) if mse > 0 else None
    copied = psnr is None or (source != SAVED and psnr >= COPY_PSNR_IN_VIDEO)
    return {"first_frame_to_image_psnr": psnr, "first_frame_copied": float(copied)}
