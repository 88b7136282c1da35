"""Estimates of work, memory and disk of a Wan model, from its JSON files and shard headers alone.

Operations are exact counts of the matrix products (other operations are a few percent); how long they take here, `speed.py`
measures. Memory formulas name the large tensors only. All are estimates, to be shown as such; preflight compares them with what
the machine has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq import ui
from ptq.checkpoint.safetensors_file import TensorEntry, read_header
from ptq.checkpoint.shards import ShardSet
from ptq.store.files import read_json
from ptq.wan.block import BLOCKS, Rows, block_inputs, video_tokens, width
from ptq.wan.layout import ModelLayout
from ptq.wan.pipeline import OFFLOAD_MODES

if TYPE_CHECKING:
    from ptq.wan.presets import ModelPreset

HIDDEN_COPIES = 8
"""Tensors of the size of a block's hidden states alive at once: residual, norm, q, k, v, attention output, two casts."""
LIBRARY_BYTES = 700 * 2**20
"""Python, torch, diffusers and transformers, loaded."""
LOADING_SECONDS = 5.0
"""Importing the libraries and loading the smallest pipeline, on one core."""
LOADING_RATE = 0.5e9
"""Bytes of weights loaded in a second, on top of that."""
DECODER_COPIES = 6
"""Full-resolution feature maps alive at once in the VAE decoder, which works on four frames at a time."""


@dataclass(frozen=True)
class CallSize:
    """One denoiser call: tokens of video, text and image encoder, and the shape [C, T, H, W] of its latent input."""

    tokens: int
    text: int
    latent: tuple[int, int, int, int]
    image: int = 0

    def rows(self, kind: Rows) -> int:
        """How many rows an input of this kind has."""
        return {"video": self.tokens, "text": self.text, "image": self.image, "one": 1}[kind]


def call_size(layout: ModelLayout, preset: ModelPreset) -> CallSize:
    """Tokens and latent shape for a preset's video size, with the strides that vae/config.json states."""
    vae = _part_config(layout.path, "vae")
    config = next(iter(layout.experts.values()))
    period, stride = vae.get("scale_factor_temporal") or 4, vae.get("scale_factor_spatial") or 8
    times, rows, columns = (preset.num_frames - 1) // period + 1, preset.height // stride, preset.width // stride
    latent = (int(config["in_channels"]), times, rows, columns)
    return CallSize(video_tokens(config, latent), preset.max_sequence_length, latent, _image_tokens(layout))


def _image_tokens(layout: ModelLayout) -> int:
    """Tokens that the image encoder makes of a picture: its patches and one for the whole; 0 where no block reads them."""
    if layout.variant.image_dim is None:
        return 0
    encoder = _part_config(layout.path, "image_encoder")
    return (encoder.get("image_size", 224) // encoder.get("patch_size", 14)) ** 2 + 1


def forward_flops(config: Mapping[str, Any], size: CallSize) -> float:
    """Operations of one call of an expert: the Linears of every block, and its attentions."""
    linear = sum(2.0 * size.rows(i.rows) * len(i.linears) * i.n * i.k for i in block_inputs(config).values())
    attention = 4.0 * size.tokens * (size.tokens + size.text + size.image) * width(config)
    return int(config["num_layers"]) * (linear + attention)


def hessian_flops(config: Mapping[str, Any], size: CallSize) -> float:
    """Operations of adding one call's inputs to the Hessians of every block; half of each is mirrored."""
    return int(config["num_layers"]) * sum(float(size.rows(i.rows)) * i.k * i.k for i in block_inputs(config).values())


def solve_flops(config: Mapping[str, Any]) -> float:
    """Operations of GPTQ for one expert: factorisations (2 K^3 with the inverse) and rounding (N K^2 a Linear)."""
    inputs = block_inputs(config).values()
    return int(config["num_layers"]) * sum(2.0 * i.k**3 + len(i.linears) * i.n * float(i.k) ** 2 for i in inputs)


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
    vae = _part_config(layout.path, "vae")
    channels = int(vae.get("decoder_base_dim") or vae.get("base_dim") or 96)
    frames = min(preset.num_frames, vae.get("scale_factor_temporal") or 4)
    pixels = preset.height * preset.width
    last_stage = pixels // int(vae.get("patch_size") or 1) ** 2  # TI2V-5B's decoder ends in patches of 2 x 2 pixels
    return DECODER_COPIES * channels * frames * last_stage * 4 + preset.num_frames * pixels * 3 * 4


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes that running a pipeline takes: of RAM and of the GPU (0 on a CPU), each the larger of two phases.

    encoding, denoising: of the phases, where the model computes; the text encoder is freed before the second begins.
    """

    ram: int
    vram: int
    encoding: int
    denoising: int

    def describe(self) -> str:
        """The peak where the model computes, and what it is the larger of."""
        peak, encoding, denoising = map(
            ui.format_bytes, (max(self.encoding, self.denoising), self.encoding, self.denoising)
        )
        return f"{peak}, the larger of {encoding} to encode the prompts and {denoising} to denoise"


def sampling_memory(
    layout: ModelLayout, preset: ModelPreset, device: str, offload: str, *, decode: bool
) -> SamplingMemory:
    """What recording or generating takes (`decode`: videos are decoded too).

    A pipeline is loaded into RAM first, whatever the device; the libraries are in it too.
    """
    on_gpu = device != "cpu"
    float_bytes = 2 if on_gpu else 4
    sizes = component_bytes(layout.path, float_bytes)
    encoder, rest = sizes.pop("text_encoder", 0), sum(sizes.values())
    config, call = next(iter(layout.experts.values())), call_size(layout, preset)
    work = denoiser_activation_bytes(config, call, float_bytes)
    work = max(work, decoder_activation_bytes(layout, preset)) if decode else work
    if not on_gpu:
        encoding, denoising = LIBRARY_BYTES + encoder, LIBRARY_BYTES + rest + work
        return SamplingMemory(max(encoding, denoising), 0, encoding, denoising)
    if offload == "sequential":
        layers = [_loaded(entry, float_bytes) for entry in _entries(layout.path / "text_encoder")]
        encoding, resident = max(layers, default=0), 0
    elif offload == "group":
        experts = [_group_bytes(layout.path / expert, float_bytes) for expert in layout.experts]
        encoding, resident = encoder, max(experts) + sum(sizes[name] for name in sizes if name not in layout.experts)
    else:
        encoding, resident = encoder, rest if offload == "none" else max(sizes.values())
    denoising = resident + work
    return SamplingMemory(LIBRARY_BYTES + max(encoder, rest), max(encoding, denoising), encoding, denoising)


def memory_facts(layout: ModelLayout, gpu_bytes: int | None = None) -> dict[str, str]:
    """For each place where a video of the model's defaults can be made: what it takes, whether it fits a GPU of this size, and
    which to take: the first that fits, for each moves more than the one before."""
    facts = {"RAM for a video, on a CPU": sampling_memory(layout, layout.preset, "cpu", "none", decode=True).describe()}
    fitting = []
    for mode in OFFLOAD_MODES:
        need = sampling_memory(layout, layout.preset, "cuda", mode, decode=True)
        fits = "" if gpu_bytes is None else f"; {'fits' if need.vram <= gpu_bytes else 'does not fit'} this GPU"
        facts[f"GPU memory for a video, --offload {mode}"] = f"{need.describe()}{fits}"
        if gpu_bytes is not None and need.vram <= gpu_bytes:
            fitting.append(mode)
    if gpu_bytes is not None:
        facts["--offload to take"] = fitting[0] if fitting else "none fits: a smaller size or fewer frames"
    return facts


def _group_bytes(directory: Path, float_bytes: int) -> int:
    """What group offloading holds of an expert at once: the block that computes, the next one, and all that is in no block."""
    groups: dict[str, int] = {}
    for entry in _entries(directory):
        head, _, tail = entry.name.partition(".")
        block = tail.partition(".")[0] if head == BLOCKS else ""
        groups[block] = groups.get(block, 0) + _loaded(entry, float_bytes)
    return groups.pop("", 0) + 2 * max(groups.values(), default=0)


def _part_config(path: Path, part: str) -> dict[str, Any]:
    file = path / part / "config.json"
    return read_json(file) if file.exists() else {}
