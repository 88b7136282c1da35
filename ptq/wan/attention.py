"""`--attention-backend fa3` and `fa3-fp8`: FlashAttention-3 of the package fa3-fwd (the extra `attention`), for Hopper GPUs.

diffusers has no name for the package, so its function stands under names of diffusers' registry that no machine with an
NVIDIA GPU can ask for: nothing that a user names is replaced. What is checked here needs no torch.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ptq.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

FA3, FA3_FP8 = "fa3", "fa3-fp8"
SLOTS = {FA3: "_native_npu", FA3_FP8: "_native_xla"}
"""Name of ours -> the name of diffusers' registry that its function stands under."""
PACKAGE, MODULE = "fa3-fwd", "fa3_fwd_interface"
HOPPER = 9
"""Major compute capability."""
E4M3_MAX = 448.0


def rounds_more(backend: str | None) -> bool:
    """Whether an attention multiplies in 8 bits or fewer: its videos are not those of attention in bfloat16."""
    return backend is not None and (backend.lower() == FA3_FP8 or "sage" in backend.lower())


def package_version() -> str | None:
    """The installed version of the package; None without it."""
    try:
        return version(PACKAGE) if importlib.util.find_spec(MODULE) else None
    except PackageNotFoundError:
        return None


def check_attention(backend: str | None, dtype: str | None, context_parallel: int, device: str | None) -> None:
    """Refuse one of `SLOTS` where it cannot run; dtype and device None: not known yet.

    Raises:
        UsageError: the package is missing, the device is no Hopper GPU, float32, or a video that several processes make.
    """
    if backend not in SLOTS:
        return
    if context_parallel > 1:
        problem = f"attends within one process, and the video is made by {context_parallel} (--context-parallel)"
    elif dtype == "float32":
        problem = "computes in bfloat16 at most, and this run is in float32 (--dtype)"
    else:
        problem = obstacle(device) or ""
    if problem:
        raise UsageError(
            f"--attention-backend {backend} cannot be used here: it {problem}. Leave it out for the attention of torch."
        )


def obstacle(device: str | None) -> str | None:
    """Why the package cannot run on a device (None: on one that is not known yet), after the word "it"; None where it can."""
    if device is not None and not device.startswith("cuda"):
        return f"needs a Hopper GPU (compute capability 9.0), and the device is {device}"
    if package_version() is None:
        return f"needs the package {PACKAGE}: pip install 'wan-ptq[attention]' (Linux, CUDA 13, torch 2.10 or later)"
    if device is not None:
        import torch

        found = torch.cuda.get_device_capability(device)
        if found[0] != HOPPER:
            return f"needs a Hopper GPU (compute capability 9.0), and {device} has {found[0]}.{found[1]}"
    return None


def attention_facts(device: str) -> dict[str, str]:
    """For `ptq doctor`: the backends, and the package that they run or why they cannot."""
    problem = obstacle(device)
    said = f"{PACKAGE} {package_version()}" if problem is None else f"not here: it {problem}"
    return {f"attention {', '.join(SLOTS)}": said}


def use_flash_3(module: Any, backend: str) -> None:
    """Let every attention of a diffusers model run one of `SLOTS`; `check_attention` has passed."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    for name, function in ((FA3, attend), (FA3_FP8, attend_fp8)):
        _AttentionBackendRegistry.register(AttentionBackendName(SLOTS[name]))(function)
    slot = AttentionBackendName(SLOTS[backend])
    for part in module.modules():  # not `set_attention_backend`, which sets it for every other model of the process too
        processor: Any = getattr(part, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = slot


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention in bfloat16: query [B, L, H, D], key and value [B, S, H, D] -> [B, L, H, D].

    Raises:
        UsageError: a mask, or a video that several processes make.
    """
    from fa3_fwd_interface import flash_attn_func

    _refuse(attn_mask, _parallel_config)
    return flash_attn_func(query, key, value, softmax_scale=scale, causal=is_causal)


def attend_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    _parallel_config: Any = None,
) -> Tensor:
    """`attend` with all three in FP8 (e4m3, one factor for each head), where a video's tokens attend to each other.

    Keys go without their mean over the tokens: it adds the same to all scores of a query, which softmax does not see, and the
    rest needs fewer bits (as SageAttention does, arXiv 2410.02367). Attention to text or picture takes hardly any time and
    stays in bfloat16.
    """
    if query.shape[1] != key.shape[1]:
        return attend(query, key, value, attn_mask, is_causal, scale, _parallel_config)
    from fa3_fwd_interface import flash_attn_func

    _refuse(attn_mask, _parallel_config)
    (q, q_factor), (k, k_factor), (v, v_factor) = map(to_fp8, (query, key - key.mean(1, keepdim=True), value))
    factors = {"q_descale": q_factor, "k_descale": k_factor, "v_descale": v_factor}
    return flash_attn_func(q, k, v, softmax_scale=scale, causal=is_causal, **factors).to(query.dtype)


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, L, H, D] -> (e4m3 of that shape, float32 [B, H]: what a head's values are to be multiplied by)."""
    import torch

    factor = x.abs().amax((1, 3)).float().clamp(min=torch.finfo(torch.float32).tiny * E4M3_MAX) / E4M3_MAX
    return (x / factor[:, None, :, None]).to(torch.float8_e4m3fn), factor


def _refuse(mask: Tensor | None, parallel: Any) -> None:
    if mask is not None or parallel is not None:
        raise UsageError(
            "FlashAttention-3 takes no mask and attends within one process. Leave out --attention-backend for the attention of torch."
        )
