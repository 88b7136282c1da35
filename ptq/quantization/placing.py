"""Where the parts of a quantize run live and are computed: streams of hidden states, solves too small for a GPU, conversions on one."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ptq import ui
from ptq.errors import PtqError, UsageError
from ptq.runtime.conversion import KernelConversion
from ptq.scheme import Scheme
from ptq.solvers.conversion import DEFINITION, Conversion

Place = Literal["gpu", "pinned", "memory", "disk"]
"""Of the streams: on the GPU, in page-locked RAM, in RAM, in a memory-mapped file."""
StreamsOption = Literal["auto", "gpu", "pinned", "memory", "disk"]
PLACE_WORDS: dict[Place, str] = {
    "gpu": "kept on the GPU",
    "pinned": "in page-locked memory, copied ahead",
    "memory": "in memory",
    "disk": "in memory-mapped files, read ahead",
}
PLACES: dict[bool, tuple[Place, ...]] = {True: ("gpu", "pinned", "disk"), False: ("memory", "disk")}
"""Whether the run has a GPU -> places that a stream can have there, the fastest first."""
SMALL_SOLVE = 2.0**29
"""Operations, K^2 (K + rows), below which an input is solved on the CPU: less than half a second of one core, while a GPU waits
for a thousand launches whatever the size. Every input of `tiny` is below, none of width 1536 and more."""


def parse_streams(text: str, device: str) -> StreamsOption:
    """Parse --streams.

    Raises:
        UsageError: no such place, or not one of this device.
    """
    allowed = ("auto", *PLACES[device != "cpu"])
    for option in get_args(StreamsOption):
        if text == option and option in allowed:
            return option
    raise UsageError(
        f"--streams takes {', '.join(allowed)} where the run is on {device}, found {text!r}. Leave it out to let the free memory decide."
    )


def choose_place(wanted: StreamsOption, need: int, *, gpu: int | None, ram: int) -> Place:
    """Where both streams go.

    Args:
        wanted: a place, or auto: the first in which they fit.
        need: bytes of both.
        gpu: bytes of GPU memory left beside the work of a block; None without a GPU.
        ram: bytes of RAM that they may take.
    """
    if wanted != "auto":
        return wanted
    room = {"gpu": gpu or 0, "pinned": ram, "memory": ram}
    return next(place for place in PLACES[gpu is not None] if need <= room.get(place, need))


def check_place(place: Place, need: int, free: int, what: str, hint: str) -> None:
    """Raise PtqError where streams are to go to the disk and it has fewer than `need` bytes `free`."""
    if place == "disk" and free < need:
        raise PtqError(
            f"{what} take {ui.format_bytes(need)}, more than the memory they may use, and the disk has {ui.format_bytes(free)}. {hint}"
        )


def conversion_on(device: torch.device, scheme: Scheme) -> Conversion:
    """How tensors on a device are converted: by kernels on a GPU where the scheme has them."""
    return KernelConversion() if KernelConversion.takes(scheme, device) else DEFINITION


def solve_device(device: torch.device, cost: float) -> torch.device:
    """Where an input whose solve costs K^2 (K + rows) operations is solved: small ones on the CPU."""
    return torch.device("cpu") if cost < SMALL_SOLVE else device
