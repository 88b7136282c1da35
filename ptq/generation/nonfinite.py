"""Where a value that is not finite came from: the denoiser calls of the failed step are repeated with a hook on every
module, and the first module whose output is not finite is named.

Costs nothing while all is well: the recorder keeps references to the last step's inputs, and hooks on inner modules exist
only during the repetition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """One forward call of an expert."""

    expert: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextlib.contextmanager
def recorded_calls(experts: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """Yield a list that gets every call of an expert while the block runs; clear it to forget them."""
    calls: list[Call] = []
    with contextlib.ExitStack() as hooks:
        for name, module in experts.items():

            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                calls.append(Call(name, args, dict(kwargs)))

            hooks.enter_context(module.register_forward_pre_hook(keep, with_kwargs=True))
        yield calls


class _FoundError(Exception):
    """Ends the repeated forward pass at the first bad module; carries the sentence about it."""


@torch.no_grad()
def find_nonfinite(experts: Mapping[str, nn.Module], calls: list[Call]) -> str:
    """Repeat recorded calls and say in words where the first value that is not finite appears.

    Returns:
        For example "first in the output of transformer_2.blocks.3.ffn.net.2 (NaN)".
    """
    for call in list(calls):
        for key, value in [*enumerate(call.args), *call.kwargs.items()]:
            if not _finite(value):
                return f"the input {key} of {call.expert} was not finite already ({_kind(value)})"
        with contextlib.ExitStack() as hooks:
            for name, module in experts[call.expert].named_modules():
                path = f"{call.expert}.{name}" if name else call.expert
                hooks.enter_context(module.register_forward_hook(_make_hook(path)))
            try:
                experts[call.expert](*call.args, **call.kwargs)
            except _FoundError as found:
                return str(found)
    return "all denoiser outputs are finite, so it arose in the guidance or the scheduler step"


def _make_hook(path: str) -> Any:
    def check(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Children finish before their parents, so the first bad module is the innermost; a bad input means that plain
        # arithmetic between modules made it.
        if not _finite(output):
            bad_input = next((value for value in args if not _finite(value)), None)
            if bad_input is not None:
                raise _FoundError(f"first in the input of {path} ({_kind(bad_input)})")
            raise _FoundError(f"first in the output of {path} ({_kind(output)})")

    return check


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point())


def _kind(value: Any) -> str:
    return "NaN" if any(bool(t.isnan().any()) for t in _tensors(value) if t.is_floating_point()) else "infinity"
