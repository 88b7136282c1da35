"""Adapter files as they are published, for models of any size: random low-rank pairs for chosen layers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 4
STRONG = 0.3
"""Standard deviation of both factors: an adapter that nobody can overlook."""
_ORIGINAL = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> Linear of the blocks that both naming styles know."""
    ends = tuple(_ORIGINAL)
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n.startswith("blocks.") and n.endswith(ends)
    }


def factors(
    linears: dict[str, nn.Linear], *, rank: int = RANK, seed: int = 0, std: float = STRONG
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A [rank, K], B [N, rank]), float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator) * std,
            torch.randn(layer.out_features, rank, generator=generator) * std,
        )
        for name, layer in linears.items()
    }


def diffusers_names(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """`transformer.<layer>.lora_A/B.weight`, as diffusers and PEFT write."""
    return {
        f"transformer.{name}.lora_{side}.weight": tensor
        for name, pair in pairs.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def original_names(pairs: dict[str, tuple[Tensor, Tensor]], alpha: float | None = None) -> dict[str, Tensor]:
    """`diffusion_model.<layer of the original repository>.lora_down/up.weight`, and `alpha` where given."""
    tensors = {}
    for name, (down, up) in pairs.items():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        stem = f"diffusion_model.blocks.{block}.{_ORIGINAL[rest]}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path
