"""Tables of the GPU suite: linears, a block, quantizer bandwidth, a denoiser step, tile candidates.

Weights are random: speed and memory do not depend on their values. Every time includes input quantization and weight
expansion.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptq.runtime import ops
from ptq.runtime.backends import recipe_schemes
from ptq.runtime.bench_linear import Run, median_seconds, quantized_layer
from ptq.runtime.kernels import gemm_fp8
from ptq.runtime.kernels.expand_weight import expand_weight
from ptq.runtime.kernels.quantize import Output, quantize
from ptq.runtime.kernels.tiles import Tile
from ptq.runtime.last_input import forget_input
from ptq.scheme import Scheme
from ptq.wan.attention import FA3, FA3_FP8, SLOTS, attend, obstacle, use_flash_3

A14B = {"heads": 40, "ffn": 13824, "layers": 40, "channels": 16, "latent": (21, 60, 104)}
TI2V_5B = {"heads": 24, "ffn": 14336, "layers": 30, "channels": 48, "latent": (31, 44, 80)}
SMALL = {"heads": 1, "ffn": 256, "layers": 2, "channels": 16, "latent": (1, 4, 4)}
"""Geometry of one denoiser call: 832 x 480 x 81 frames, 1280 x 704 x 121 frames, and one that a CPU runs at once."""
TEXT_TOKENS, TEXT_DIM = 512, 4096
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
HADAMARD = Scheme.of("mxfp4", transform="hadamard", block=32)
"""For kernels by themselves."""
TILE_CANDIDATES = tuple(
    Tile(m, n, k, warps, stages)
    for m, n, warps in ((64, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
    for k in (64, 128)
    for stages in (3, 4, 5)
)


def block_inputs(width: int, ffn: int) -> dict[str, list[tuple[int, int]]]:
    """Distinct input of a block, in order -> [N, K] of the Linears that read it."""
    square = (width, width)
    return {
        "query, key, value": [square] * 3,
        "attention's output": [square],
        "query of the text's attention": [square],
        "key, value of the text": [square] * 2,
        "output of the text's attention": [square],
        "feed-forward": [(ffn, width)],
        "feed-forward's output": [(width, ffn)],
    }


def block_linears(rows: int, width: int, ffn: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The ten Linears of one block in order; query, key and value share their input, keys and values the text."""
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    text = torch.randn(TEXT_TOKENS, width, device=device, dtype=torch.bfloat16)
    hidden = torch.randn(rows, ffn, device=device, dtype=torch.bfloat16)
    linears = [(i, shape) for i, own in enumerate(block_inputs(width, ffn).values()) for shape in own]
    inputs, shapes = zip(*linears, strict=True)

    def call(layers: list[nn.Module]) -> Tensor:
        # One fresh tensor for each distinct input, as a model has them: sharing works by identity.
        tensors = [x.view_as(x), x.view_as(x), x.view_as(x), text.view_as(text), x.view_as(x), x.view_as(x)]
        tensors.append(hidden.view_as(hidden))
        return [layer(tensors[index]) for layer, index in zip(layers, inputs, strict=True)][-1]

    weights = [torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5 for shape in shapes]
    models = {"bf16": [_plain(weight) for weight in weights]}
    schemes = recipe_schemes()
    models |= {name: [quantized_layer(weight, scheme) for weight in weights] for name, scheme in schemes.items()}
    with torch.no_grad():
        runs: dict[str, Run] = {name: functools.partial(call, layers) for name, layers in models.items()}
        seconds = median_seconds(runs, device, repeats)
    nbytes = {name: sum(_bytes(layer) for layer in layers) for name, layers in models.items()}
    return _relative_rows("block Linears", seconds, nbytes)


def quantizer_bandwidth(rows: int, width: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Bytes read and written a second by each output of the quantizer, beside a copy of the input."""
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    smooth = torch.ones(width, device=device, dtype=torch.bfloat16)

    def values(scheme: Scheme, basis: Tensor, out: Output) -> Tensor:
        return quantize(x, basis, scheme, out).values

    jobs: dict[str, tuple[Run, float]] = {"copy": (x.clone, 4.0)}
    outputs: dict[str, dict[Output, float]] = {
        "mxfp4": {"fp8": 3.0, "packed": 2.53, "bf16": 4.0},
        "hif4": {"packed": 2.56, "bf16": 4.0},
    }
    for name, outs in outputs.items():
        scheme = Scheme.of(name, transform="smoothed", block=32)
        for out, nbytes in outs.items():
            jobs[f"{name} {out}"] = (functools.partial(values, scheme, smooth, out), nbytes)
    for name, scheme in recipe_schemes().items():
        own: Output = "fp8" if scheme.format.exact_in_fp8(scheme.input_rule) else "bf16"
        run = functools.partial(values, scheme, scheme.transform.plain(width, device), own)
        jobs[f"{name} {own}, recipe"] = (run, outputs["mxfp4"][own])
    seconds = median_seconds({name: run for name, (run, _) in jobs.items()}, device, repeats)
    rate = {name: x.numel() * nbytes / seconds[name] / 1e9 for name, (_, nbytes) in jobs.items()}
    return [
        {"job": name, "us": seconds[name] * 1e6, "GB/s": rate[name], "of copy": rate[name] / rate["copy"]}
        for name in jobs
    ]


def denoiser_step(geometry: dict[str, Any], device: torch.device, repeats: int, backend: str) -> list[dict[str, Any]]:
    """One forward of a random-weight WanTransformer3DModel, bfloat16 and quantized, with its peak memory.

    The first row is the baseline: bfloat16 with compiled blocks and the fastest attention of the installation. Where fa3-fwd runs,
    the compiled models are measured with attention in FP8 too. One model at a time is in memory.

    Args:
        backend: of torch.compile.
    """
    results: dict[str, float] = {}
    memory: dict[str, int] = {}
    best = fastest_attention(geometry, device, repeats)
    kinds = {", compiled": (backend, best), "": (None, best)}
    if obstacle(str(device)) is None:
        kinds[f", compiled, {FA3_FP8}"] = (backend, FA3_FP8)
    for name, scheme in {"bf16": None, **recipe_schemes()}.items():
        for label, (compiler, attention) in kinds.items():
            with torch.no_grad():
                found = _one_step(geometry, scheme, device, repeats, compiler, attention)
            results[name + label], memory[name + label] = found
    rows = _relative_rows("denoiser step", results, memory)
    return [{**row, "attention": FA3_FP8 if row["candidate"].endswith(FA3_FP8) else best} for row in rows]


def _one_step(
    geometry: dict[str, Any],
    scheme: Scheme | None,
    device: torch.device,
    repeats: int,
    backend: str | None,
    attention: str,
) -> tuple[float, int]:
    """Seconds of a forward and the peak of memory while it runs. Nothing of the model outlives the call."""
    model, inputs = _denoiser(geometry, device)
    if attention in SLOTS:
        use_flash_3(model, attention)
    if scheme is not None:
        quantize_blocks(model, scheme)
    if backend is not None:
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    forget_input()
    gc.collect()
    _reset_peak(device)
    with contextlib.nullcontext() if attention in SLOTS else sdpa_kernel(SDPBackend.__members__[attention]):
        seconds = median_seconds({"step": lambda: model(**inputs).sample}, device, repeats)["step"]
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def fastest_attention(geometry: dict[str, Any], device: torch.device, repeats: int) -> str:
    """The attention in bfloat16 that is fastest on the tokens of this geometry: a name of `SDPBackend`, or fa3 where it runs."""
    frames, height, width = geometry["latent"]
    shape = (1, geometry["heads"], frames * (height // 2) * (width // 2), 128)
    dtype = torch.bfloat16
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    seconds: dict[str, float] = {}
    for one in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        if one is SDPBackend.MATH and seconds:
            break  # holds all scores at once: only where nothing else runs
        with warnings.catch_warnings(), sdpa_kernel(one):
            warnings.simplefilter("ignore")  # torch warns about each thing that a refused backend lacks
            try:
                run = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
                seconds[one.name] = median_seconds({"a": run}, device, repeats)["a"]
            except RuntimeError:  # torch's way to say that this one does not run here
                continue
    if obstacle(str(device)) is None:
        tokens = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        seconds[FA3] = median_seconds({"a": lambda: attend(*tokens)}, device, repeats)["a"]
    return min(seconds, key=seconds.__getitem__)


def quantize_blocks(model: nn.Module, scheme: Scheme) -> int:
    """Replace the attention and feed-forward Linears of every block by round-to-nearest layers; returns how many."""
    count = 0
    for parent_name, parent in model.named_modules():
        if ".attn" not in f".{parent_name}" and ".ffn" not in f".{parent_name}":
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and f"{parent_name}.{name}".endswith(TARGETS):
                setattr(parent, name, quantized_layer(child.weight.detach(), scheme, _detached(child.bias)))
                count += 1
    return count


def tile_candidates(rows: int, n: int, k: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """TFLOP/s of gemm_fp8 for each candidate tile that runs, fastest first: entries for kernels/tiles.py."""
    from triton.runtime.errors import OutOfResources

    weight = quantized_layer(torch.randn(n, k, device=device) / k**0.5, HADAMARD).packed
    placement = ops.placement_of(weight)
    w = expand_weight(weight, placement)
    a = quantize(torch.randn(rows, k, device=device).bfloat16(), None, HADAMARD, "fp8").values
    found = []
    for tile in TILE_CANDIDATES:
        run = lambda tile=tile: gemm_fp8.gemm_fp8(a, w, placement.exponent, None, None, torch.bfloat16, tile=tile)  # noqa: E731
        try:
            seconds = median_seconds({"tile": run}, device, repeats)["tile"]
        except OutOfResources:
            continue
        found.append({"shape": [rows, n, k], "tile": str(tile), "TFLOP/s": 2 * rows * n * k / seconds / 1e12})
    return sorted(found, key=lambda row: -row["TFLOP/s"])


def _denoiser(geometry: dict[str, Any], device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import WanTransformer3DModel

    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=geometry["heads"],
            attention_head_dim=128,
            ffn_dim=geometry["ffn"],
            num_layers=geometry["layers"],
            in_channels=geometry["channels"],
            out_channels=geometry["channels"],
            text_dim=TEXT_DIM,
        )
        model = model.to(torch.bfloat16).eval()
        latent = torch.randn(1, geometry["channels"], *geometry["latent"], dtype=torch.bfloat16)
        text = torch.randn(1, TEXT_TOKENS, TEXT_DIM, dtype=torch.bfloat16)
        inputs = {"hidden_states": latent, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}
    return model, inputs


def _plain(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _bytes(layer: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in layer.parameters())


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _relative_rows(job: str, seconds: dict[str, float], nbytes: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """Table rows; the first candidate is the baseline."""
    baseline = next(iter(seconds))
    rows = []
    for name, value in seconds.items():
        row: dict[str, Any] = {"job": job, "candidate": name, "ms": value * 1e3, "speedup": seconds[baseline] / value}
        if nbytes is not None:
            row |= {"GB": nbytes[name] / 1e9, "memory ratio": nbytes[name] / max(nbytes[baseline], 1)}
        rows.append(row)
    return rows
