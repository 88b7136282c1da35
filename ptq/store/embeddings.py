"""Text embeddings of a run's prompts, in its state folder: one safetensors file a text, named by what decides its content.

"prompt_embeds" [tokens, width] in the text encoder's dtype, without the zeros that fill it up. A file says its own digest, so one
that is damaged, or carries another's name, is known and made again. The folder may be deleted when nothing runs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ptq.store.files import write_tensors
from ptq.store.records import TEXT

if TYPE_CHECKING:
    from torch import Tensor


FOLDER = "embeddings"
"""Of a run's state folder."""
_OWN = "sha256"
"""The only key of a file's metadata: with two, their order would vary, and the bytes with it."""


def embedding_file(folder: Path, key: str) -> Path:
    """Where the embedding with this key lies."""
    return folder / f"{key}.safetensors"


def write_embedding(folder: Path, key: str, embeds: Tensor) -> None:
    """Write [length, width] atomically; rows of zeros at the end are left out.

    Raises:
        PtqError: the disk is full or not writable.
    """
    filled = embeds.ne(0).any(dim=1).nonzero()
    embeds = embeds[: int(filled[-1]) + 1 if len(filled) else 0].contiguous()
    write_tensors(embedding_file(folder, key), {TEXT: embeds}, {_OWN: _digest(key, embeds)})


def read_embedding(folder: Path, key: str, length: int) -> Tensor | None:
    """[length, width] with its zeros, or None where it is absent, damaged or of something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(embedding_file(folder, key), framework="pt") as handle:
            made = handle.metadata() or {}
            embeds = handle.get_tensor(TEXT)
    except (SafetensorError, OSError):
        return None
    if embeds.dim() != 2 or len(embeds) > length or made != {_OWN: _digest(key, embeds)}:
        return None
    whole = embeds.new_zeros(length, embeds.shape[1])
    whole[: len(embeds)] = embeds
    return whole


def _digest(key: str, embeds: Tensor) -> str:
    """Over name, dtype, shape and bytes."""
    import torch

    head = f"{key} {embeds.dtype} {tuple(embeds.shape)} ".encode()
    return hashlib.sha256(head + embeds.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
