"""The tensors that a component's files hold against those that its configuration asks for, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ptq.checkpoint.safetensors_file import TensorEntry
from ptq.errors import DamagedFileError

FLOATS = ("F32", "F16", "BF16")
"""Dtypes of weights as they are released; others were converted by a tool, with scales or losses of its own."""


def check_tensors(
    where: Path, entries: Mapping[str, TensorEntry], expected: Mapping[str, Tensor], ignored: Sequence[str] = ()
) -> None:
    """Refuse files whose tensors are not those of the model.

    Args:
        where: the component's directory, for messages.
        entries: what its files hold.
        expected: name -> tensor (on meta) of the model that its configuration describes.
        ignored: regular expressions of names that the model's class leaves out when it loads.

    Raises:
        DamagedFileError: tensors are missing, unexpected, of another shape or dtype; names how many and the first.
    """
    found = {name for name in entries if name in expected or not any(re.search(part, name) for part in ignored)}
    refuse_names(where, [name for name in expected if name not in found], sorted(found - set(expected)), len(expected))
    for name, tensor in expected.items():
        entry, wanted = entries[name], str(tensor.dtype).removeprefix("torch.")
        fits = entry.dtype in FLOATS if tensor.is_floating_point() else entry.torch_dtype == tensor.dtype
        if entry.shape != tuple(tensor.shape) or not fits:
            kind = f"one of {', '.join(FLOATS)}" if tensor.is_floating_point() else wanted
            raise DamagedFileError(
                f"{entry.file}: tensor {name} is {entry.dtype} {list(entry.shape)}, but config.json asks for {kind} {list(tensor.shape)}. The configuration and the weights are not of one model; download or copy it again."
            )


def refuse_names(where: Path, missing: Sequence[str], unexpected: Sequence[str], total: int) -> None:
    """Refuse missing and unexpected tensors.

    Args:
        total: how many tensors the configuration asks for.

    Raises:
        DamagedFileError: there are some.
    """
    if missing and unexpected:
        raise DamagedFileError(
            f"{where} lacks tensor {missing[0]} ({len(missing)} of the {total} that its config.json requires) and holds tensor {unexpected[0]} ({len(unexpected)} that it does not know). The weights are of another model, or their names were changed; download or copy the model again."
        )
    if missing:
        raise DamagedFileError(
            f"{where} lacks tensor {missing[0]}, which its config.json requires ({len(missing)} of {total} are missing). The weights are incomplete or of another model; download or copy it again."
        )
    if unexpected:
        raise DamagedFileError(
            f"{where} holds tensor {unexpected[0]}, which its config.json does not know ({len(unexpected)} such tensors). The configuration and the weights are not of one model; download or copy it again."
        )
