"""Random-weight Wan pipelines of any size, made of the real diffusers and transformers classes.

For tests, trials without downloads, and memory or speed figures at true widths. Such a model draws noise: it says
nothing about quality. Blocks are written one at a time, so that a full-width expert never has to fit in memory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ptq.checkpoint.safetensors_file import read_header
from ptq.checkpoint.shards import write_component
from ptq.config import load_preset
from ptq.config.preset import PRESET_FILE
from ptq.errors import UsageError
from ptq.store.files import write_json
from ptq.wan.structure import BLOCKS, block_prefix

TEXT_DIM = 64
TRUE_WIDTH = {"T2V-A14B": (40, 128, 13824), "I2V-A14B": (40, 128, 13824), "TI2V-5B": (24, 128, 14336)}
SMALL_HEAD_DIM = 32
BOUNDARY_RATIO = {"T2V-A14B": 0.875, "I2V-A14B": 0.9, "TI2V-5B": None}
CORPUS = (
    "a red ball rolls over the green grass while two people talk in a kitchen",
    "the camera follows a dog that runs along the beach at sunset, slow motion",
    "close-up of a hand holding a cup of coffee, steam rising in warm light",
)


def make_random_pipeline(
    out: str | Path,
    variant: str = "T2V-A14B",
    *,
    layers: int = 2,
    width: int | None = 128,
    ffn: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a random-weight pipeline directory.

    Args:
        out: directory to create.
        variant: "T2V-A14B", "I2V-A14B" or "TI2V-5B"; decides experts, channels, pipeline class, boundary.
        layers: transformer blocks of each expert.
        width: inner dimension (a multiple of 64; heads of 32), or None for the variant's true width and heads of 128.
        ffn: feed-forward dimension; default the true one, or twice the width.
        seed: of all weights.
        dtype: of the transformers on disk; VAE and text encoder are float32.
        max_shard_bytes: shard limit of the transformers.

    Returns:
        `out` as a Path. The directory carries its own preset (64x64, 9 frames, 8 steps).

    Raises:
        UsageError: `out` exists, or the width does not fit.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists already; choose another directory.")
    preset = load_preset(variant)
    if width is not None and width % 64:
        raise UsageError(f"width must be a multiple of 64, found {width}.")
    torch.manual_seed(seed)
    z_dim = 48 if variant == "TI2V-5B" else 16
    vae = _make_vae(variant, z_dim)
    encoder = _make_text_encoder()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=preset.flow_shift, num_train_timesteps=1000
    )
    vae.save_pretrained(out / "vae")
    encoder.save_pretrained(out / "text_encoder")
    _make_tokenizer().save_pretrained(out / "tokenizer")
    scheduler.save_pretrained(out / "scheduler")
    boundary = BOUNDARY_RATIO[variant]
    experts = ["transformer", "transformer_2"] if boundary is not None else ["transformer"]
    config = _transformer_config(variant, layers, width, ffn, z_dim)
    for index, expert in enumerate(experts):
        write_random_transformer(out / expert, config, seed=seed + 1 + index, dtype=dtype, max_bytes=max_shard_bytes)
    _write_index(out, variant, experts, boundary)
    small = {"height": 64, "width": 64, "num_frames": 9, "steps": 8, "max_sequence_length": 64, "hub_id": None}
    write_json(out / PRESET_FILE, preset.model_copy(update=small).model_dump())
    return out


def write_random_transformer(
    directory: Path, config: dict[str, Any], *, seed: int, dtype: torch.dtype, max_bytes: int
) -> None:
    """Write one expert block by block: the weights of a freshly initialised WanTransformer3DModel."""
    parts = directory / "parts"
    parts.mkdir(parents=True)
    with torch.device("meta"):
        skeleton = WanTransformer3DModel(**config)
    generator = torch.Generator().manual_seed(seed)
    blocks = [(block_prefix(i), block) for i, block in enumerate(skeleton.blocks)]
    skeleton.save_config(directory)
    order = list(skeleton.state_dict())
    for prefix, module in [*blocks, ("", skeleton)]:
        tensors = {
            prefix + name: _random_tensor(name, meta, generator).to(dtype)
            for name, meta in module.state_dict().items()
            if prefix or not name.startswith(f"{BLOCKS}.")
        }
        save_file(tensors, parts / f"{prefix or 'rest'}.safetensors")
    entries = {}
    for file in sorted(parts.iterdir()):
        entries.update(read_header(file))
    write_component(directory, [entries[name] for name in order], max_bytes)
    shutil.rmtree(parts)


def _random_tensor(name: str, meta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values of the size that trained Wan weights have: unit norms, small biases, fan-in scaled matrices."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(meta.shape)
    values = torch.randn(meta.shape, generator=generator)
    if name.endswith("bias"):
        return values.mul_(0.02)
    fan_in = meta[0].numel() if meta.dim() > 1 else meta.numel()
    return values.mul_(fan_in**-0.5)


def _transformer_config(variant: str, layers: int, width: int | None, ffn: int | None, z_dim: int) -> dict[str, Any]:
    if width is None:
        heads, head_dim, true_ffn = TRUE_WIDTH[variant]
    else:
        heads, head_dim, true_ffn = width // SMALL_HEAD_DIM, SMALL_HEAD_DIM, 2 * width
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "ffn_dim": ffn or true_ffn,
        "num_layers": layers,
        # I2V sees noise, mask (4) and image latents: 16 + 4 + 16 channels.
        "in_channels": 36 if variant == "I2V-A14B" else z_dim,
        "out_channels": z_dim,
        "text_dim": TEXT_DIM,
    }


def _make_vae(variant: str, z_dim: int) -> nn.Module:
    config: dict[str, Any] = {"base_dim": 8, "z_dim": z_dim, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
    config.update(latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim, decoder_base_dim=8, is_residual=True)
    if variant == "TI2V-5B":  # two-pixel patches in front: 16x in space with three halvings
        config.update(patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    return AutoencoderKLWan(**config, temperal_downsample=[False, True, True]).eval()


def _make_text_encoder() -> nn.Module:
    config = UMT5Config(
        vocab_size=512, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def _make_tokenizer() -> PreTrainedTokenizerFast:
    # The trainer of the library orders equal pieces by a random hash; counted words are the same every time.
    words = Counter(f"▁{word}" for line in CORPUS for word in line.replace(",", "").split())
    total = sum(words.values())
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(word, math.log(count / total)) for word, count in sorted(words.items()) if len(word) > 2]
    pieces += [(chr(code), -10.0) for code in range(33, 127)] + [("▁", -10.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _write_index(out: Path, variant: str, experts: list[str], boundary: float | None) -> None:
    image_pipeline = variant == "I2V-A14B"
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if image_pipeline else "WanPipeline",
        "_diffusers_version": json.loads((out / "vae" / "config.json").read_text())["_diffusers_version"],
        "boundary_ratio": boundary,
        "expand_timesteps": variant == "TI2V-5B",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if "transformer_2" in experts else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if image_pipeline:
        index.update(image_encoder=[None, None], image_processor=[None, None])
    write_json(out / "model_index.json", index)
