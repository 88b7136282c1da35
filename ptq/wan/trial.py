"""A trial before hours are spent: write a tiny packed expert where the results will go, load it back, run it.

It goes through the same code as the real thing (shards, index, checksums, the diffusers quantizer, the layer's backend),
so a disk that cannot be written, a broken installation or a GPU that does not compute shows up now.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

import ptq  # noqa: F401  (registers the quantizer that from_pretrained needs)
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.checkpoint.safetensors_file import read_header
from ptq.checkpoint.shards import ShardSet, write_component
from ptq.errors import PtqError
from ptq.runtime import QuantLinear
from ptq.runtime.backends import unreported
from ptq.scheme import Scheme
from ptq.store.files import read_json, temporary_directory, write_bytes
from ptq.wan.block import block_inputs, block_prefix
from ptq.wan.replay import state_names

SIZE = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 128, "num_layers": 1, "text_dim": 32}
"""config.json of the trial expert."""
SEED = 5
"""Of its weights."""
SCRATCH = "ptq-preflight"
"""Name of the temporary directory."""
TRIAL_BLOCK = 64
"""Size of the rotated blocks; every format's groups divide it."""


def run_trial(folder: Path, format_name: str, device: str) -> None:
    """Write, reload and run a small random packed expert in a temporary directory inside `folder`.

    Raises:
        PtqError: the disk cannot be written, what was read differs from what was written, or the device computes
            something that is not finite.
    """
    with temporary_directory(folder, SCRATCH) as scratch:
        _round_trip(scratch, format_name, device)


def _round_trip(scratch: Path, format_name: str, device: str) -> None:
    expert = scratch / "transformer"
    written = _write(expert, Scheme.of(format_name, transform="hadamard", block=TRIAL_BLOCK))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = WanTransformer3DModel.from_pretrained(expert, dtype=dtype, use_safetensors=True)
    read = model.state_dict()
    for name, tensor in written.items():
        if not torch.equal(read[name].cpu(), tensor):
            raise PtqError(
                f"A small test checkpoint was written to {scratch.parent} and read back, but tensor {name} came back different. The disk or the installation is damaged; nothing long was started."
            )
    with torch.no_grad(), unreported():
        output = model.to(device)(
            hidden_states=torch.randn(1, 16, 1, 4, 4).to(device, dtype),
            timestep=torch.tensor([500], device=device),
            encoder_hidden_states=torch.randn(1, 8, SIZE["text_dim"]).to(device, dtype),
            return_dict=False,
        )[0]
    if not torch.isfinite(output).all():
        raise PtqError(
            f"A small {format_name} model gave values that are not finite on {device}. The GPU, its driver or the installed torch do not work; nothing long was started. `ptq doctor` shows the versions."
        )


def _write(expert: Path, scheme: Scheme) -> dict[str, Tensor]:
    """Write the packed expert; returns its packed tensors."""
    original, packed = expert.parent / "original.safetensors", expert.parent / "packed.safetensors"
    generator = torch.Generator().manual_seed(SEED)
    with torch.device("meta"):
        skeleton = WanTransformer3DModel(**SIZE)
    skeleton.save_config(expert)
    state = {
        name: torch.randn(meta.shape, generator=generator).mul_(0.1) for name, meta in skeleton.state_dict().items()
    }
    linears = tuple(linear for item in block_inputs(SIZE).values() for linear in item.linears)
    config = PackedConfig(scheme, linears)
    changed: dict[str, Tensor] = {}
    for name in (f"{block_prefix(0)}{linear}" for linear in linears):
        layer = QuantLinear.from_codes(scheme.format.quantize(state.pop(f"{name}.weight")), scheme, None, None)
        changed |= {f"{name}.weight_packed": layer.weight_packed.data, f"{name}.weight_scale": layer.weight_scale.data}
    save_file(state, original)
    save_file(changed, packed)
    entries = {**read_header(original), **read_header(packed)}
    own: dict[str, Any] = read_json(expert / "config.json")
    names = state_names(own, config)
    write_component(expert, [entries[name] for name in names])
    own["quantization_config"] = config.to_dict()
    write_bytes(expert / "config.json", json.dumps(own).encode())
    ShardSet(expert)
    return changed
