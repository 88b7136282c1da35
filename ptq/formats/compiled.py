"""Large CPU tensors through torch.compile: the same conversions, fused, with the same codes.

One kernel is compiled for each (operation, format, options, input dtype), for chunks of a fixed number of groups, so that
no tensor shape ever compiles again; the rest of a tensor, small tensors and other devices take the eager functions.
Compiling needs a C++ compiler and Python's headers at run time: `compile_support` says whether they are there.
"""

from __future__ import annotations

import functools
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ptq.formats.base import Format, chunks, fusion_barrier, into, pack_columns, to_columns

COMPILE_MIN_ELEMENTS = 2**23
"""Smaller tensors are converted in less time than a kernel compiles."""

Operation = Callable[[Tensor], tuple[Tensor, ...]]

_failed: str | None = None


def quantize_and_pack(
    format: Format, x: Tensor, *, scale_rule: str | None = None, ties: str | None = None
) -> tuple[Tensor, Tensor]:
    """`format.pack(format.quantize(x))` in one pass over x [..., K], without unpacked codes in between.

    Returns:
        weight_packed uint8 [..., K/2], weight_scale [..., K/group_size].

    Raises:
        FormatError: as `Format.quantize`.
    """
    rule, ties = format.check(x, scale_rule, ties)
    groups = x.detach().reshape(-1, format.group_size)
    packed = torch.empty(len(groups), format.group_size // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(groups), dtype=format.scale_dtype, device=x.device)
    _run(functools.partial(_pack_groups, format, rule, ties), groups, (packed, scales))
    k = x.shape[-1]
    return packed.view(*x.shape[:-1], k // 2), scales.view(*x.shape[:-1], k // format.group_size)


def fake_quantize(format: Format, x: Tensor, *, scale_rule: str | None = None, ties: str | None = None) -> Tensor:
    """`format.fake_quantize(x)`, compiled where x is large.

    Raises:
        FormatError: as `Format.quantize`.
    """
    rule, ties = format.check(x, scale_rule, ties)
    groups = x.detach().reshape(-1, format.group_size)
    values = torch.empty_like(groups)
    _run(functools.partial(_fake_groups, format, rule, ties), groups, (values,))
    return values.view(x.shape)


@functools.cache
def compile_support() -> tuple[bool, str]:
    """Whether conversions can be compiled on this machine, and one sentence for `ptq doctor`."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return False, "No C++ compiler: large tensors are quantized without torch.compile, more slowly. Install g++."
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return False, (
            f"{header} is missing: large tensors are quantized without torch.compile, more slowly. "
            "Install Python's development headers."
        )
    return True, f"Large tensors are quantized with kernels that torch.compile builds with {compiler}."


def _pack_groups(format: Format, rule: str, ties: str, groups: Tensor) -> tuple[Tensor, ...]:
    columns = to_columns(groups)
    fusion_barrier()
    elements, scales = format.quantize_columns(columns, rule, ties)
    fusion_barrier()
    return pack_columns(elements), scales


def _fake_groups(format: Format, rule: str, ties: str, groups: Tensor) -> tuple[Tensor, ...]:
    columns = to_columns(groups)
    fusion_barrier()
    return (into(groups.dtype, format.fake_quantize_columns(columns, rule, ties)).T,)


def _run(operation: functools.partial[tuple[Tensor, ...]], groups: Tensor, outputs: tuple[Tensor, ...]) -> None:
    """Apply `operation` to chunks of groups [n, group] and store what it returns in rows of `outputs`."""
    fast = _compiled(operation.func, *operation.args, groups.dtype) if _worth_compiling(groups) else None
    full = None
    for part in chunks(groups):
        size = part.stop - part.start
        full = full or size
        results = _try(fast, operation, groups[part]) if fast and size == full else operation(groups[part])
        for output, result in zip(outputs, results, strict=True):
            output[part] = result


def _worth_compiling(groups: Tensor) -> bool:
    large = groups.device.type == "cpu" and groups.numel() >= COMPILE_MIN_ELEMENTS
    return large and _failed is None and compile_support()[0]


@functools.cache
def _compiled(function: Callable[..., tuple[Tensor, ...]], format: Format, rule: str, ties: str, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """The compiled operation; dtype is part of the key so that each one has its own cache of one entry."""

    def operation(groups: Tensor) -> tuple[Tensor, ...]:
        return function(format, rule, ties, groups)

    return torch.compile(operation, dynamic=False)


def _try(fast: Operation, operation: Operation, groups: Tensor) -> tuple[Tensor, ...]:
    """Run the compiled operation; a toolchain that fails is reported once, and eager code takes over."""
    global _failed
    if _failed is not None:
        return operation(groups)
    try:
        return fast(groups)
    except torch._dynamo.exc.TorchDynamoException as error:
        _failed = str(error).strip().splitlines()[0]
        warnings.warn(f"torch.compile failed ({_failed}); quantizing without it, more slowly.", stacklevel=2)
        return operation(groups)
