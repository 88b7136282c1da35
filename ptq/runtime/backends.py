"""Which implementation runs a quantized layer, why, and how to force another.

    triton-fp8    MXFP4 as FP8 on Hopper and Blackwell: our persistent kernel
    scaled-mm     the same operands through torch._scaled_mm (cuBLASLt)
    dot-scaled    MXFP4 on Blackwell's block-scaled tensor cores, nothing expanded
    bf16-decode   both formats, any CUDA device since sm_80: exact values in bfloat16
    cpu           float32 on the CPU

The choice depends on the device, the format, the shape and the placement of the weight. It is never silent: each choice
is reported once with its reason, and a forced backend (`PTQ_BACKEND`, `use_backend`) that cannot run is an error that
says why. Nothing here runs a kernel; `ptq.runtime.ops` does.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

from ptq import ui
from ptq.errors import UsageError
from ptq.runtime.exactness import BF16_DECODED, Placement
from ptq.runtime.spec import QuantSpec

BACKENDS = ("triton-fp8", "scaled-mm", "dot-scaled", "bf16-decode", "cpu")
PREFERENCE = ("dot-scaled", "triton-fp8", "scaled-mm", "bf16-decode")
"""Order in which a CUDA device tries them."""
FEW_ROWS = 64
"""Up to this many rows the packed weight is read once and decoded in registers (bf16-decode), whatever the device."""
VARIABLE = "PTQ_BACKEND"


@dataclass(frozen=True)
class Machine:
    """What decides about a backend: device type, compute capability (0, 0 without CUDA), whether triton is there."""

    device: str
    capability: tuple[int, int]
    triton: bool


@dataclass(frozen=True)
class Choice:
    """A backend and one sentence why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Shape:
    """Rows, output features, input features of one call."""

    m: int
    n: int
    k: int


ON_CPU = Choice("cpu", "the tensors are on the CPU")

_forced: str | None = None


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


def choose(spec: QuantSpec, shape: Shape, placement: Placement, machine: Machine, forced: str | None) -> Choice:
    """The backend for one call.

    Args:
        placement: of the weight (`ptq.runtime.exactness.place`); ignored on the CPU and for HiF4.
        forced: a backend name, or None for the best that can run.

    Raises:
        UsageError: the forced backend, or every backend, cannot run here.
    """
    if forced is not None:
        reason = obstacle(forced, spec, shape, placement, machine)
        if reason:
            raise UsageError(
                f"Backend {forced} was asked for but cannot run this {spec.format} layer ([{shape.m}, {shape.k}] x [{shape.n}, {shape.k}]): {reason}. Leave {VARIABLE} and --backend unset to use the best that can."
            )
        return Choice(forced, "asked for")
    if machine.device == "cpu":
        return ON_CPU
    candidates = ("bf16-decode",) if shape.m <= FEW_ROWS else PREFERENCE
    refusals: list[str] = []
    for backend in candidates:
        reason = obstacle(backend, spec, shape, placement, machine)
        if reason is None:
            return Choice(backend, "; ".join(refusals) or _merit(backend, shape))
        refusals.append(f"not {backend}: {reason}")
    raise UsageError(f"No backend can run {spec.format} layers on this device: {'; '.join(refusals)}.")


def obstacle(backend: str, spec: QuantSpec, shape: Shape, placement: Placement, machine: Machine) -> str | None:
    """Why `backend` cannot run this call, or None."""
    if (backend == "cpu") != (machine.device == "cpu"):
        return f"the tensors are on {machine.device}"
    if backend == "cpu":
        return None
    if not machine.triton:
        return "triton is not installed (pip install triton)"
    if backend == "bf16-decode":
        return None if machine.capability >= (8, 0) else f"it needs compute capability 8.0, found {_dotted(machine)}"
    if spec.format != "mxfp4":
        return f"{spec.format} scales have mantissas, exact in bfloat16 only"
    return _mxfp4_obstacle(backend, shape, placement, machine)


def _mxfp4_obstacle(backend: str, shape: Shape, placement: Placement, machine: Machine) -> str | None:
    major = machine.capability[0]
    if backend == "dot-scaled":
        return None if major in (10, 12) else f"block-scaled tensor cores came with Blackwell, found {_dotted(machine)}"
    if placement.kind == "bf16":
        return f"the weight does not fit FP8 ({placement.reason})"
    if backend == "triton-fp8":
        return (
            None if major in (9, 10, 12) else f"it needs tensor memory access (9.0 or later), found {_dotted(machine)}"
        )
    if placement.kind != "e4m3":
        return f"torch._scaled_mm takes e4m3 weights with one factor, this one is {placement.kind} ({placement.reason})"
    if machine.capability < (8, 9):
        return f"FP8 tensor cores came with 8.9, found {_dotted(machine)}"
    if shape.n % 16 or shape.k % 16:
        return f"torch._scaled_mm needs N and K to be multiples of 16, found {shape.n} and {shape.k}"
    return None


def preview(machine: Machine) -> dict[str, str]:
    """Format -> "backend: reason" for a large layer on this machine, for `ptq doctor`; what is forced counts."""
    found = {}
    for name, placement in (("mxfp4", Placement("e4m3", 0, None, "a usual weight")), ("hif4", BF16_DECODED)):
        try:
            choice = choose(QuantSpec(name), Shape(32760, 5120, 5120), placement, machine, forced_backend())
        except UsageError as error:
            found[name] = str(error)
        else:
            found[name] = f"{choice.backend}: {choice.reason}"
    return found


def machine_of(device: torch.device) -> Machine:
    """Facts of a torch device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return Machine(device.type, capability, has_triton())


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported (it exists for Linux only)."""
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=256)
def report_once(format_name: str, choice: Choice) -> None:
    """Tell the user once per format, backend and reason."""
    ui.info(f"{format_name} layers run on backend {choice.backend}: {choice.reason}.")


def _merit(backend: str, shape: Shape) -> str:
    if shape.m <= FEW_ROWS:
        return f"at most {FEW_ROWS} rows: the weight is decoded while it is read"
    return {
        "dot-scaled": "block-scaled tensor cores multiply the packed codes",
        "triton-fp8": "MXFP4 is exact in FP8",
        "scaled-mm": "MXFP4 is exact in FP8",
        "bf16-decode": "exact in bfloat16",
    }[backend]


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise UsageError(f"{source} names the backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    return name


def _dotted(machine: Machine) -> str:
    return f"{machine.capability[0]}.{machine.capability[1]}"
