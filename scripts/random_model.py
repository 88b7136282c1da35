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
from ptq.errors import UsageError
from ptq.store.files import write_json
from ptq.wan.block import BLOCKS, block_prefix
from ptq.wan.presets import PRESET_FILE, load_preset
from ptq.wan.variants import EXPERTS, TRANSFORMER_CLASS, VARIANTS, Variant

TEXT_DIM = 64
"""Width of the text encoder."""
SMALL_HEAD_DIM = 32
"""Channels of a head where the width is not the true one."""
IMAGE_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Size of the image encoder (CLIP), for the variants whose blocks read its tokens."""
IMAGE_SIDE, IMAGE_PATCH = 32, 16
"""Pixels of the picture that the image encoder sees, and of its patches: 5 tokens."""
CORPUS = (
    "a red ball rolls over the green grass while two people talk in a kitchen",
    "the camera follows a dog that runs along the beach at sunset, slow motion",
    "close-up of a hand holding a cup of coffee, steam rising in warm light",
)
"""Text whose words are the tokenizer's vocabulary."""


def make_random_pipeline(
    out: str | Path,
    variant: str = next(iter(VARIANTS)),
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
        variant: a name in `VARIANTS`; decides experts, channels, pipeline class, boundary, image encoder.
        layers: transformer blocks of each expert.
        width: inner dimension (a multiple of 64; heads of 32), or None for the variant's true width and heads of 128.
        ffn: feed-forward dimension; default the true one, or twice the width.
        seed: of all weights.
        dtype: of the transformers on disk; VAE and encoders are float32.
        max_shard_bytes: shard limit of the transformers.

    Returns:
        `out` as a Path. The directory carries its own preset (64x64, 9 frames, 8 steps).

    Raises:
        UsageError: `out` exists, or the width does not fit.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists already; choose another directory.")
    preset, kind = load_preset(variant), VARIANTS[variant]
    if width is not None and width % 64:
        raise UsageError(f"width must be a multiple of 64, found {width}.")
    torch.manual_seed(seed)
    vae = _make_vae(kind)
    encoder = _make_text_encoder()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=preset.flow_shift, num_train_timesteps=1000
    )
    vae.save_pretrained(out / "vae")
    encoder.save_pretrained(out / "text_encoder")
    _make_tokenizer().save_pretrained(out / "tokenizer")
    scheduler.save_pretrained(out / "scheduler")
    if kind.image_dim is not None:
        _save_image_encoder(out)
    config = _transformer_config(kind, layers, width, ffn)
    for index, expert in enumerate(kind.experts):
        write_random_transformer(out / expert, config, seed=seed + 1 + index, dtype=dtype, max_bytes=max_shard_bytes)
    _write_index(out, kind)
    small = {"height": 64, "width": 64, "num_frames": 9, "steps": 8, "hub_id": None}
    small |= {"max_sequence_length": 64} if kind.image_dim is None else {}  # there the attention counts on all 512
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


def _transformer_config(kind: Variant, layers: int, width: int | None, ffn: int | None) -> dict[str, Any]:
    if width is None:
        heads, head_dim, true_ffn = kind.heads, kind.head_dim, kind.ffn
    else:
        heads, head_dim, true_ffn = width // SMALL_HEAD_DIM, SMALL_HEAD_DIM, 2 * width
    image = {"image_dim": IMAGE_ENCODER["hidden_size"], "added_kv_proj_dim": heads * head_dim}
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "ffn_dim": ffn or true_ffn,
        "num_layers": layers,
        "in_channels": kind.in_channels,
        "out_channels": kind.latent_channels,
        "text_dim": TEXT_DIM,
        **(image if kind.image_dim is not None else {}),
    }


def _make_vae(kind: Variant) -> nn.Module:
    z_dim = kind.latent_channels
    config: dict[str, Any] = {"base_dim": 8, "z_dim": z_dim, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
    config.update(latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim, decoder_base_dim=8, is_residual=True)
    if kind.expand_timesteps:  # TI2V-5B: two-pixel patches in front: 16x in space with three halvings
        config.update(patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    return AutoencoderKLWan(**config, temperal_downsample=[False, True, True]).eval()


def _make_text_encoder() -> nn.Module:
    config = UMT5Config(
        vocab_size=512, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def _save_image_encoder(out: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**IMAGE_ENCODER, image_size=IMAGE_SIDE, patch_size=IMAGE_PATCH)
    CLIPVisionModel(config).eval().save_pretrained(out / "image_encoder")
    size = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIDE}, crop_size=size).save_pretrained(out / "image_processor")


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


def _write_index(out: Path, kind: Variant) -> None:
    index: dict[str, Any] = {
        "_class_name": kind.pipeline,
        "_diffusers_version": json.loads((out / "vae" / "config.json").read_text())["_diffusers_version"],
        "boundary_ratio": kind.boundary_ratio,
        "expand_timesteps": kind.expand_timesteps,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        **{name: ["diffusers", TRANSFORMER_CLASS] if name in kind.experts else [None, None] for name in EXPERTS},
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if kind.image_dim is not None:
        index.update(
            image_encoder=["transformers", "CLIPVisionModel"], image_processor=["transformers", "CLIPImageProcessor"]
        )
    elif kind.image == "required":
        index.update(image_encoder=[None, None], image_processor=[None, None])
    write_json(out / "model_index.json", index)
