"""Which implementation runs a quantized layer, why, and how to force another.

A backend is one value: its name and device, what speaks against it, how it runs, what speaks for it. The choice depends on
the device, the scheme, the shape and the placement of the weight. It is never silent: each choice is reported once with its
reason, and a forced backend (`PTQ_BACKEND`, `use_backend`) that cannot run is an error that says why.

    dot-scaled    Blackwell's block-scaled tensor cores, nothing expanded       ptq/runtime/gpu.py
    scaled-mm     exact in FP8, values and sums: torch._scaled_mm (cuBLASLt) without fast accumulation
    triton-fp8    the same operands on Hopper and Blackwell, every placement: our persistent kernel, sums of 14 bits on Hopper
    bf16-decode   every format with kernels, any CUDA device since sm_80: exact values in bfloat16
    cpu           float32 on the CPU, every format                              ptq/runtime/cpu.py
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq import ui
from ptq.config import installed_recipes
from ptq.errors import UsageError
from ptq.runtime.weight import PackedWeight
from ptq.scheme import Placement, Scheme, get_format
from ptq.scheme.format import FORMATS
from ptq.scheme.placement import DECODED

FEW_ROWS = 64
"""Up to this many rows only backends that read the packed weight once and decode it in registers are considered."""
VARIABLE = "PTQ_BACKEND"


@dataclass(frozen=True)
class Machine:
    """What decides about a backend: device type, compute capability (0, 0 without CUDA), whether triton is there."""

    device: str
    capability: tuple[int, int]
    triton: bool

    @property
    def dotted(self) -> str:
        """The capability as people write it."""
        return f"{self.capability[0]}.{self.capability[1]}"


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        scheme: of the layer. m, n, k: rows, output features, input features.
        placement: of the weight (`Format.place`); ignored on the CPU.
        machine: where.
    """

    scheme: Scheme
    m: int
    n: int
    k: int
    placement: Placement
    machine: Machine


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: as users write it.
        device: type of the device that it runs on.
        merit: why it is taken where it can be.
        obstacle: why it cannot run a call on its device, or None.
        run: (x [..., K] on the device, weight with contiguous tensors, placement) -> [M, N] of any float dtype.
        few_rows: whether it is made for at most FEW_ROWS rows too.
        fast: whether its products run faster than those of bfloat16.
    """

    name: str
    device: str
    merit: str
    obstacle: Callable[[Call], str | None]
    run: Callable[[Tensor, PackedWeight, Placement], Tensor]
    few_rows: bool = False
    fast: bool = False


@dataclass(frozen=True)
class Choice:
    """A backend and one sentence why."""

    backend: Backend
    reason: str


BACKENDS: dict[str, Backend] = {}
"""Name -> backend, in the order in which they are tried."""

_forced: str | None = None
_unreported = False


def register_backend(backend: Backend) -> Backend:
    """Make a backend known; it is tried after those that are."""
    BACKENDS[backend.name] = backend
    return backend


def use_backend(name: str | None) -> None:
    """Force a backend for every following call of the process (None: choose again). Wins over PTQ_BACKEND.

    Raises:
        UsageError: no such backend.
    """
    global _forced
    _forced = _known(name, "--backend") if name else None


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or PTQ_BACKEND, or None.

    Raises:
        UsageError: PTQ_BACKEND names no backend.
    """
    if _forced is not None:
        return _forced
    name = os.environ.get(VARIABLE)
    return _known(name, VARIABLE) if name else None


def choose(call: Call, forced: str | None) -> Choice:
    """The backend for one call.

    Args:
        forced: a backend name, or None for the best that can run.

    Raises:
        UsageError: the forced backend, or every backend, cannot run here.
    """
    if forced is not None:
        reason = obstacle(BACKENDS[forced], call)
        if reason:
            raise UsageError(
                f"Backend {forced} was asked for but cannot run this {call.scheme.format.name} layer ([{call.m}, {call.k}] x [{call.n}, {call.k}]): {reason}. Leave {VARIABLE} and --backend unset to use the best that can."
            )
        return Choice(BACKENDS[forced], "asked for")
    few = call.m <= FEW_ROWS
    refusals: list[str] = []
    for backend in BACKENDS.values():
        if backend.device != call.machine.device or (few and not backend.few_rows):
            continue
        reason = obstacle(backend, call)
        if reason is None:
            return Choice(backend, "; ".join(refusals) or _merit(backend, few))
        refusals.append(f"not {backend.name}: {reason}")
    raise UsageError(f"No backend can run {call.scheme.format.name} layers on this device: {'; '.join(refusals)}.")


def obstacle(backend: Backend, call: Call) -> str | None:
    """Why `backend` cannot run this call, or None."""
    if backend.device != call.machine.device:
        return f"the tensors are on {call.machine.device}"
    return backend.obstacle(call)


def recipe_schemes() -> dict[str, Scheme]:
    """Installed recipe -> the numerics of its layers; those that are made for one format, in the order of the formats."""
    return {
        name: Scheme.of(fmt, **recipe.scheme.model_dump())
        for fmt in FORMATS
        for name, recipe in installed_recipes().items()
        if recipe.format == fmt
    }


def preview(machine: Machine) -> dict[str, str]:
    """Format or recipe -> "backend: reason" for a large layer on this machine, for `ptq doctor`; what is forced counts."""
    schemes = {name: Scheme(get_format(name)) for name in FORMATS} | recipe_schemes()
    choices = {name: _large_layer(scheme, machine) for name, scheme in schemes.items()}
    return {
        name: f"{choice.backend.name}: {choice.reason}" if isinstance(choice, Choice) else str(choice)
        for name, choice in choices.items()
    }


def advice(machine: Machine) -> str:
    """Which recipe to take on this machine, by what a large layer of each would run on."""
    choices = {name: _large_layer(scheme, machine) for name, scheme in recipe_schemes().items()}
    fast = {name: one.backend.name for name, one in choices.items() if isinstance(one, Choice) and one.backend.fast}
    if fast:
        return f"{' or '.join(fast)} for speed ({', '.join(dict.fromkeys(fast.values()))}), hif4 for quality"
    return "hif4 for quality; no recipe is faster than another here"


def _large_layer(scheme: Scheme, machine: Machine) -> Choice | UsageError:
    """What a layer of many rows and a usual weight would run on; the error where nothing can run it."""
    fp8 = scheme.format.exact_in_fp8(scheme.input_rule)
    placement = Placement("e4m3", 0, None, "a usual weight") if fp8 else DECODED
    try:
        return choose(Call(scheme, 32760, 5120, 5120, placement, machine), forced_backend())
    except UsageError as error:
        return error


def machine_of(device: torch.device) -> Machine:
    """Facts of a torch device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return Machine(device.type, capability, has_triton())


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported (it exists for Linux only)."""
    return importlib.util.find_spec("triton") is not None


def report_once(format_name: str, backend: str, reason: str) -> None:
    """Tell the user once per format, backend and reason; nothing of layers that are not the user's (`unreported`)."""
    if not _unreported:
        tell_once(format_name, backend, reason)


@functools.lru_cache(maxsize=256)
def tell_once(format_name: str, backend: str, reason: str) -> None:
    """The message of `report_once`."""
    ui.info(f"{format_name} layers run on backend {backend}: {reason}.")


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """While the block runs, choices are not reported: its layers are no part of the user's model."""
    global _unreported
    before, _unreported = _unreported, True
    try:
        yield
    finally:
        _unreported = before


def _merit(backend: Backend, few: bool) -> str:
    if few and backend.device != "cpu":
        return f"at most {FEW_ROWS} rows: the weight is decoded while it is read"
    return backend.merit


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise UsageError(f"{source} names the backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    return name
