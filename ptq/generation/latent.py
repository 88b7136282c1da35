"""`--fixed-latent FILE`: one initial latent that every unit of a run starts from, as published scores ask for.

The file is safetensors with one float32 tensor. Its digest, not its name, is a setting of the run: that of the manifest's
`latent_sha256`. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptq import ui
from ptq.checkpoint.safetensors_file import read_header
from ptq.errors import DamagedFileError, UsageError

if TYPE_CHECKING:
    import numpy as np

_PICKLED = (b"PK\x03\x04", b"\x80")
"""How files of `torch.save` begin."""
_FORM = "a safetensors file with one float32 tensor of shape [channels, frames, height, width] of the latents"


@dataclass(frozen=True)
class FixedLatent:
    """values: float32 [C, T, H, W]. digest: SHA-256 of its bytes. path: as it was given."""

    path: Path
    values: np.ndarray
    digest: str


def read_latent(path: Path, shape: tuple[int, int, int, int]) -> FixedLatent:
    """Read the initial latent of a run whose latents have this shape; a leading dimension of 1 is taken off.

    Raises:
        UsageError: no such file, a pickle, or another number of tensors, dtype, shape, or values that are not finite.
        DamagedFileError: no safetensors file, or a broken one.
    """
    import numpy as np

    if not path.is_file():
        raise UsageError(f"--fixed-latent {path} does not exist. Give {_FORM}.")
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith(_PICKLED) and not head.endswith(b"{"):  # where the header of safetensors begins
        raise UsageError(
            f"--fixed-latent {path} is a pickle, which could run code when opened. Load it where you trust it and save it as {_FORM}."
        )
    try:
        entries = read_header(path)
    except DamagedFileError as error:
        raise DamagedFileError(f"--fixed-latent cannot be read: {error} Expected is {_FORM}.") from error
    if len(entries) != 1:
        raise UsageError(
            f"--fixed-latent {path} holds {len(entries)} tensors ({ui.shorten(', '.join(entries)) or 'none'}); expected is {_FORM}."
        )
    (entry,) = entries.values()
    if entry.dtype != "F32" or entry.shape not in (shape, (1, *shape)):
        raise UsageError(
            f"--fixed-latent {path} holds a tensor {entry.dtype} {list(entry.shape)}; this model makes a video of this size from F32 {list(shape)}. Choose the size that the latent is for, or another file."
        )
    values = np.fromfile(path, dtype="<f4", count=math.prod(shape), offset=entry.start).reshape(shape)
    if not np.isfinite(values).all():
        raise UsageError(
            f"--fixed-latent {path} has values that are not finite (NaN or infinity). Make the file again."
        )
    return FixedLatent(path, values, hashlib.sha256(values.tobytes()).hexdigest())
