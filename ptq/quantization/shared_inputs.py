"""Finding Linears that read one and the same input (q, k and v), by watching which tensor objects they receive."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class InputGroup:
    """Linears that received the identical tensor at every call.

    Attributes:
        index: position among the groups, in order of the first call.
        names: the Linears, in the model's order.
        k: width of the input.
        tokens, calls: rows and calls over all batches.
    """

    index: int
    names: tuple[str, ...]
    k: int
    tokens: int
    calls: int


class _Identities:
    """A number for every distinct (tensor object, content version); numbers of freed tensors are not used again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._next = 0

    def of(self, tensor: Tensor) -> int:
        if tensor.is_inference():  # carries no version: a change in place could not be noticed
            self._next += 1
            return self._next
        version, known = tensor._version, self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version:
            return known[2]
        self._next += 1
        self._known[id(tensor)] = (weakref.ref(tensor), version, self._next)
        return self._next


@torch.no_grad()
def find_shared_inputs(
    linears: Mapping[str, nn.Module], run: Callable[[], None], see: Callable[[Tensor], None] | None = None
) -> tuple[list[InputGroup], list[str]]:
    """Run the model and group its Linears by what they received.

    Args:
        linears: name -> Linear, in the model's order.
        run: calls the model, once or more often.
        see: is given every distinct tensor, when the first Linear receives it.

    Returns:
        The groups in order of their first call, and the Linears that no call reached.
    """
    identities = _Identities()
    seen: set[int] = set()
    received: dict[str, list[int]] = defaultdict(list)  # keys in order of the first call
    tokens: dict[str, int] = defaultdict(int)

    def hook_for(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            x = inputs[0] if inputs else keywords["input"]
            number = identities.of(x)
            received[name].append(number)
            tokens[name] += x.numel() // x.shape[-1]
            if see is not None and number not in seen:
                seen.add(number)
                see(x.detach())

        return hook

    handles = [m.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, m in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    shared: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, history in received.items():
        if tokens[name]:
            shared[linears[name].weight.device, *history].append(name)
    order = {name: position for position, name in enumerate(linears)}
    groups = [
        InputGroup(
            index,
            tuple(sorted(names, key=order.__getitem__)),
            linears[names[0]].weight.shape[1],
            tokens[names[0]],
            len(received[names[0]]),
        )
        for index, names in enumerate(shared.values())
    ]
    return groups, [name for name in linears if not tokens[name]]
