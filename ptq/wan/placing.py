"""Where a pipeline's weights and tokens are while it runs: on the device, on the CPU between uses, over processes."""

from __future__ import annotations

from typing import Any

from ptq.errors import UsageError

OFFLOAD_MODES = ("none", "model", "sequential")


def place_pipeline(pipe: Any, device: str, offload: str = "none") -> Any:
    """Put a pipeline that lies on the CPU where it is to compute; returns it.

    Args:
        device: "cpu", "cuda" or "cuda:<n>".
        offload: none: every weight on the device. model: one component at a time. sequential: one layer at a time.

    Raises:
        UsageError: unknown mode, or offloading without a GPU.
    """
    check_offload(device, offload)
    if offload == "none":
        return pipe.to(device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    return pipe


def check_offload(device: str, offload: str) -> None:
    """Refuse an offload mode that this device cannot have.

    Raises:
        UsageError: unknown mode, or offloading without a GPU.
    """
    if offload not in OFFLOAD_MODES:
        raise UsageError(f"--offload must be one of {', '.join(OFFLOAD_MODES)}, found {offload!r}.")
    if offload != "none" and device == "cpu":
        raise UsageError(f"--offload {offload} moves weights between a GPU and the CPU; without a GPU use none.")


def split_over_processes(expert: Any, size: int) -> None:
    """Let the processes of the group share every call of this expert: diffusers' Ulysses context parallelism.

    Raises:
        UsageError: its attention backend cannot do that.
    """
    from diffusers import ContextParallelConfig

    try:
        expert.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))
    except ValueError as error:
        raise UsageError(f"--context-parallel cannot be used here: {error}") from error
