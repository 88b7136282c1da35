"""How much of a model is W4A4: shares of Linear parameters and of Linear FLOPs, bits a value, bytes before and after."""

from __future__ import annotations

import math
from typing import Any

from ptq.calibration.records import CalibrationSet, Record
from ptq.checkpoint.manifest import Coverage
from ptq.checkpoint.shards import ShardSet
from ptq.quantization.settings import QuantizeSettings
from ptq.wan.structure import BLOCKS, LINEARS, ModelLayout

BF16_BYTES = 2


def tokens_of(calibration: CalibrationSet, record: Record, config: dict[str, Any]) -> int:
    """Video tokens of one call: latent volume over patch volume."""
    shape = calibration.shape(record)
    return math.prod(shape[1:]) // math.prod(config["patch_size"])


def measure_coverage(
    layout: ModelLayout, shards: dict[str, ShardSet], calibration: CalibrationSet, settings: QuantizeSettings
) -> Coverage:
    """Coverage over all experts. Linear parameters are 2-D weights of the experts (embedders and output included)."""
    fmt = settings.scheme.format
    linear = quantized = basis_bytes = 0
    flops = quantized_flops = 0.0
    for expert, config in layout.experts.items():
        records = calibration.of_expert(expert)
        video = tokens_of(calibration, records[0], config)
        text = calibration.text_tokens(records[0])
        targets = {
            f"{BLOCKS}.{index}.{name}.weight"
            for index in range(layout.num_blocks(expert))
            if index not in settings.high_precision.get(expert, ())
            for name in LINEARS
        }
        for name, entry in shards[expert].entries.items():
            if not name.endswith(".weight") or len(entry.shape) != 2:
                continue
            size = math.prod(entry.shape)
            tokens = _rows(name, video, text)
            linear += size
            flops += 2.0 * size * tokens
            if name in targets:
                quantized += size
                basis_bytes += settings.scheme.basis_bytes(entry.shape[1])
                quantized_flops += 2.0 * size * tokens
    total_bytes = sum(entry.nbytes for shard in shards.values() for entry in shard.entries.values())
    return Coverage(
        linear_parameters=linear,
        quantized_parameters=quantized,
        parameter_share=quantized / linear,
        flop_share=quantized_flops / flops,
        bits_per_quantized_value=fmt.bits_per_value,
        quantized_bytes=int(quantized * fmt.bits_per_value / 8),
        basis_bytes=basis_bytes,
        original_bytes=total_bytes,
    )


def _rows(name: str, video: int, text: int) -> int:
    """Rows of the input of a Linear in one call."""
    if "text_embedder" in name or "attn2.to_k" in name or "attn2.to_v" in name:
        return text
    return 1 if "time" in name else video
