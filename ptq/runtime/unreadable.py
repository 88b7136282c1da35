"""The `weight` of a quantized layer: dtype, device and shape for libraries that ask, no numbers for anyone.

Adapters (PEFT) ask a Linear's weight where and in which dtype to put their own tensors. Whatever would read or write values
is refused. Because the class overrides `__torch_function__`, torch's fused fast paths (nn.TransformerEncoderLayer), which
would hand the weight to a kernel, are not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptq.errors import UsageError

REFUSAL = "The weight of a quantized layer is 4-bit codes: it cannot be read as a tensor, changed, or fused with an adapter (fuse_lora, merge), because rounding the sum to 4 bits again would destroy what calibration chose. Keep the adapter beside it, as load_lora_weights does, or merge it into the original model before quantizing (`ptq calibrate --lora FILE`); `dequantize()` of the layer gives its values."
"""What whoever reads or writes the weight is told."""
_FACTS = (
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "is_leaf", "is_meta", "is_cpu", "is_cuda"),
    *("is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes"),
)
_QUESTIONS = ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device")
_ANSWERED = {
    *(getattr(Tensor, name).__get__ for name in _FACTS),
    *(getattr(Tensor, name) for name in _QUESTIONS),
}


class UnreadableWeight(Tensor):
    """A tensor without values.

    Args:
        shape, dtype, device: what it answers.

    Raises:
        UsageError: at whatever needs its values.
    """

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> UnreadableWeight:
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _ANSWERED:
            raise UsageError(REFUSAL)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UsageError(REFUSAL)

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.device})"
