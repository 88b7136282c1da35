"""Conversions of CPU tensors by kernels that numba compiles: one pass over the groups, the codes of the eager functions.

A kernel is compiled at its first use, about a second, and kept on disk by numba (in `__pycache__`, else in the user's
cache directory or NUMBA_CACHE_DIR). numba itself is imported at the first conversion.

The groups of a large tensor are split over `torch.get_num_threads()` Python threads; kernels run without the GIL. numba's
own threads are not used: some of its threading layers must not be entered from several Python threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PART_ELEMENTS = 2**18
"""Elements that a thread takes at a time, about half a millisecond of work. Smaller tensors use the calling thread."""
ORDINARY = (Tensor, torch.nn.Parameter)
BITS = {torch.float32: (torch.uint32, 0), torch.bfloat16: (torch.uint16, 16)}
"""Dtype -> (unsigned integers of its width, shift that makes them float32 bits)."""


@dataclass(frozen=True)
class Kernels:
    """The compiled functions of a format, and its options.

    Attributes:
        codes: (x, shift, *options, out, scales), out uint8 [n, group] or, packed, [n, group / 2]; scales [n].
        values: (x, shift, *options, out), out like x, or x itself.
        decode: (elements, scales, out), elements uint8 [n, group] or, packed, [n, group / 2], out float32 [n, group].
        options: numbers that stand for the scale rule and the ties.

    x is [n, group]: uint32 with shift 0 (float32 bits) or uint16 with shift 16 (bfloat16 bits).
    """

    codes: Callable[..., None]
    values: Callable[..., None]
    decode: Callable[..., None]
    options: tuple[int | bool, ...]


def takes(x: Tensor) -> bool:
    """Whether x is an ordinary tensor in CPU memory: not traced, not on another device, of no tensor subclass."""
    return x.device.type == "cpu" and type(x) in ORDINARY and not torch.compiler.is_compiling()


def codes(kernels: Kernels, x: Tensor, group: int, scale_dtype: torch.dtype, packed: bool) -> tuple[Tensor, Tensor]:
    """x float32, bfloat16 or float16 [..., K] -> (elements uint8 [..., K], scales [..., K/group]).

    With `packed` the elements are [..., K/2], two nibbles a byte, even k in the low one.
    """
    per_byte = 2 if packed else 1
    bits, shift = _rows(x.float() if x.dtype == torch.float16 else x, group)
    elements = torch.empty(*x.shape[:-1], x.shape[-1] // per_byte, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // group, dtype=scale_dtype, device=x.device)
    outputs = (elements.numpy().reshape(-1, group // per_byte), scales.numpy().reshape(-1))
    _run(kernels.codes, bits, (shift, *kernels.options), outputs)
    return elements, scales


def values(kernels: Kernels, x: Tensor, group: int, in_place: bool = False) -> Tensor:
    """x float32 or bfloat16 [..., K] -> its values on the grid of the format, same shape and dtype.

    With `in_place` a contiguous x takes them itself, and is the result.
    """
    bits, shift = _rows(x, group)
    if in_place and x.is_contiguous():
        _run(kernels.values, bits, (shift, *kernels.options), (bits,))
        return x.detach()
    out = torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=False)
    _run(kernels.values, bits, (shift, *kernels.options), (_rows(out, group)[0],))
    return out


def round_rows(kernels: Kernels, rows: np.ndarray[Any, Any]) -> None:
    """Float32 bits, uint32 [n, group], become those of their values on the grid."""
    _run(kernels.values, rows, (0, *kernels.options), (rows,))


def decoded(kernels: Kernels, elements: Tensor, scales: Tensor, group: int, packed: bool) -> Tensor:
    """Elements uint8 [..., K], or [..., K/2] packed, and scales [..., K/group] -> their exact values, float32 [..., K]."""
    out = torch.empty(*scales.shape[:-1], scales.shape[-1] * group)
    inputs = (
        elements.contiguous().numpy().reshape(-1, group // (2 if packed else 1)),
        scales.contiguous().numpy().reshape(-1),
    )
    values = out.numpy().reshape(-1, group)

    def convert(part: slice) -> None:
        kernels.decode(*(x[part] for x in inputs), values[part])

    in_parts(kernels.decode, packed, len(values), PART_ELEMENTS // group, convert)
    return out


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a kernel's entry point: runs without the GIL, is kept on disk where numba finds a place to write."""
    from numba import njit

    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no place: every process compiles it
        return njit(nogil=True, error_model="numpy")(function)


def _rows(x: Tensor, group: int) -> tuple[np.ndarray[Any, Any], int]:
    x = x.detach().contiguous()
    if x.dtype == torch.float32:  # numpy's views cost less than torch's
        return x.numpy().view(np.uint32).reshape(-1, group), 0
    dtype, shift = BITS[x.dtype]
    return x.view(dtype).numpy().reshape(-1, group), shift


def _run(
    kernel: Callable[..., None],
    x: np.ndarray[Any, Any],
    options: tuple[int | bool, ...],
    outputs: tuple[np.ndarray[Any, Any], ...],
) -> None:
    """Run a kernel on rows x, over several threads where that pays."""
    part = PART_ELEMENTS // x.shape[1]
    if len(x) <= part and is_compiled(kernel, x.dtype):
        kernel(x, *options, *outputs)
        return

    def convert(part: slice) -> None:
        kernel(x[part], *options, *(out[part] for out in outputs))

    in_parts(kernel, x.dtype, len(x), part, convert)


def is_compiled(kernel: Callable[..., None], kind: Any) -> bool:
    """Whether `in_parts` has had this variant of a kernel compiled: with one part it may then be called directly."""
    return (kernel, kind) in _compiled


def in_parts(kernel: Callable[..., None], kind: Any, rows: int, part: int, run: Callable[[slice], None]) -> None:
    """Call `run` with slices of `rows`, over several threads where there is more than one part.

    Args:
        kernel, kind: what `run` calls, and which of its variants; compiled first where it is not yet.
    """
    if not is_compiled(kernel, kind):
        with _compile_lock, _process_lock(kernel), contextlib.suppress(OSError):  # the cache may be full
            run(slice(0, 0))
        _compiled.add((kernel, kind))
    workers = min(torch.get_num_threads(), -(-rows // part))
    if workers <= 1:
        run(slice(0, rows))
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, (slice(start, min(start + part, rows)) for start in range(0, rows, part))))


_compiled: set[tuple[Callable[..., None], Any]] = set()
_compile_lock = threading.Lock()


@contextlib.contextmanager
def _process_lock(kernel: Any) -> Iterator[None]:
    """One process at a time fills or reads the cache: numba's index and data files are not written as one.

    Processes that start together wait for the first one's kernels instead of compiling their own. Where a lock cannot be
    had (no cache, a file system without locks) nothing is held.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, TypeError):
            file = stack.enter_context((Path(kernel.stats.cache_path) / "ptq-kernels.lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
