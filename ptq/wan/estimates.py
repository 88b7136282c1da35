"""Estimates of work, memory and disk of a Wan model, from its JSON files and shard headers alone.

Operations are exact counts of the matrix products (other operations are a few percent). Times divide them by what a short
matrix multiplication reaches on this device, times `EFFICIENCY`: real forwards never run at that rate. Memory formulas
name the large tensors only. All are estimates, to be shown as such; preflight compares them with what the machine has.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq.checkpoint.safetensors_file import TensorEntry, read_header
from ptq.checkpoint.shards import ShardSet
from ptq.store.files import read_json
from ptq.wan.structure import INPUTS, ModelLayout

if TYPE_CHECKING:
    import torch

    from ptq.config import ModelPreset

EFFICIENCY = 0.5
"""Share of the measured matrix multiplication rate that a forward pass is assumed to reach."""
HIDDEN_COPIES = 8
"""Tensors of the size of a block's hidden states alive at once: residual, norm, q, k, v, attention output, two casts."""
DECODER_COPIES = 6
"""Full-resolution feature maps alive at once in the VAE decoder, which works on four frames at a time."""


@dataclass(frozen=True)
class CallSize:
    """One denoiser call: video tokens, text tokens, and the shape [C, T, H, W] of its latent input."""

    tokens: int
    text: int
    latent: tuple[int, int, int, int]


def call_size(layout: ModelLayout, preset: ModelPreset) -> CallSize:
    """Tokens and latent shape for a preset's video size, with the strides that vae/config.json states."""
    vae = _vae_config(layout.path)
    config = next(iter(layout.experts.values()))
    period, stride = vae.get("scale_factor_temporal") or 4, vae.get("scale_factor_spatial") or 8
    shape = ((preset.num_frames - 1) // period + 1, preset.height // stride, preset.width // stride)
    tokens = 1
    for size, patch in zip(shape, config["patch_size"], strict=True):
        tokens *= size // patch
    return CallSize(tokens, preset.max_sequence_length, (int(config["in_channels"]), *shape))


def width(config: Mapping[str, Any]) -> int:
    """Inner dimension of an expert."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def forward_flops(config: Mapping[str, Any], size: CallSize) -> float:
    """Operations of one call of an expert: the ten Linears of every block, and both attentions."""
    d, ffn, blocks = width(config), int(config["ffn_dim"]), int(config["num_layers"])
    linear = 2.0 * size.tokens * (6 * d * d + 2 * d * ffn) + 2.0 * size.text * 2 * d * d
    attention = 4.0 * size.tokens * (size.tokens + size.text) * d
    return blocks * (linear + attention)


def hessian_flops(config: Mapping[str, Any], size: CallSize) -> float:
    """Operations of adding one call's inputs to the seven Hessians of every block; half of each is mirrored."""
    total = 0.0
    for name, k in input_widths(config).items():
        total += (size.text if name == "attn2.context" else size.tokens) * k * k
    return int(config["num_layers"]) * total


def solve_flops(config: Mapping[str, Any]) -> float:
    """Operations of GPTQ for one expert: factorisations (2 K^3 with the inverse) and rounding (N K^2 a Linear)."""
    d, ffn = width(config), int(config["ffn_dim"])
    factor = sum(2.0 * k**3 for k in input_widths(config).values())
    rounding = 8.0 * d * d * d + ffn * d * d + d * ffn * ffn
    return int(config["num_layers"]) * (factor + rounding)


def input_widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Distinct input of a block -> its number of channels K."""
    return {name: int(config["ffn_dim"]) if name == "ffn.hidden" else width(config) for name in INPUTS}


def component_bytes(path: Path, float_bytes: int) -> dict[str, int]:
    """Component of a pipeline directory -> bytes of its weights once loaded.

    Floats take `float_bytes` each (the VAE four: it runs in float32), packed integers what they take on disk.
    """
    sizes = {}
    for directory in sorted(p for p in path.iterdir() if p.is_dir()):
        entries = _entries(directory)
        if entries:
            sizes[directory.name] = sum(
                _loaded(entry, 4 if directory.name == "vae" else float_bytes) for entry in entries
            )
    return sizes


def _entries(directory: Path) -> list[TensorEntry]:
    if directory.name.startswith("transformer"):
        return list(ShardSet(directory).entries.values())
    return [entry for file in sorted(directory.glob("*.safetensors")) for entry in read_header(file).values()]


def _loaded(entry: TensorEntry, float_bytes: int) -> int:
    if not entry.torch_dtype.is_floating_point:
        return entry.nbytes
    return entry.nbytes // entry.torch_dtype.itemsize * float_bytes


def denoiser_activation_bytes(config: Mapping[str, Any], size: CallSize, float_bytes: int) -> int:
    """Peak of one block's activations: hidden states, and the feed-forward's two wide tensors."""
    return size.tokens * float_bytes * (HIDDEN_COPIES * width(config) + 2 * int(config["ffn_dim"]))


def decoder_activation_bytes(layout: ModelLayout, preset: ModelPreset) -> int:
    """Peak of decoding a video: float32 feature maps of the decoder's last stage."""
    vae = _vae_config(layout.path)
    channels = int(vae.get("decoder_base_dim") or vae.get("base_dim") or 96)
    frames = min(preset.num_frames, vae.get("scale_factor_temporal") or 4)
    pixels = preset.height * preset.width
    last_stage = pixels // int(vae.get("patch_size") or 1) ** 2  # TI2V-5B's decoder ends in patches of 2 x 2 pixels
    return DECODER_COPIES * channels * frames * last_stage * 4 + preset.num_frames * pixels * 3 * 4


def sampling_memory(
    layout: ModelLayout, preset: ModelPreset, device: str, offload: str, *, decode: bool
) -> dict[str, int]:
    """Bytes needed to run the pipeline: {"ram": ..., "vram": ...} ("vram" 0 on a CPU).

    A pipeline is loaded into RAM first, whatever the device.
    """
    on_gpu = device != "cpu"
    float_bytes = 2 if on_gpu else 4
    sizes = component_bytes(layout.path, float_bytes)
    config, call = next(iter(layout.experts.values())), call_size(layout, preset)
    work = denoiser_activation_bytes(config, call, float_bytes)
    work = max(work, decoder_activation_bytes(layout, preset)) if decode else work
    if not on_gpu:
        return {"ram": sum(sizes.values()) + work, "vram": 0}
    resident = {"none": sum(sizes.values()), "model": max(sizes.values()), "sequential": 0}[offload]
    return {"ram": sum(sizes.values()), "vram": resident + work}


def measure_rate(device: str, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Operations a second of a square matrix multiplication on this device (about `seconds` long)."""
    import torch

    gpu = device != "cpu"
    n = 4096 if gpu else 768
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = a @ b
        result.flatten()[0].item()  # waits for the device
        return time.perf_counter() - start

    run(1)
    once = run(1)
    count = max(1, round(seconds / once))
    return 2.0 * n**3 * count / run(count)


def _vae_config(path: Path) -> dict[str, Any]:
    file = path / "vae" / "config.json"
    return read_json(file) if file.exists() else {}
