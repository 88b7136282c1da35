"""How much of a model is W4A4: shares of Linear parameters and of Linear FLOPs, bits a value, bytes before and after."""

from __future__ import annotations

import math

from ptq import formats
from ptq.calibration.records import CalibrationSet
from ptq.checkpoint.manifest import Coverage
from ptq.checkpoint.shards import ShardSet
from ptq.quantization.settings import QuantizeSettings
from ptq.wan.block import block_prefix, rows_outside, video_tokens
from ptq.wan.estimates import CallSize
from ptq.wan.layout import ModelLayout


def recorded_call(layout: ModelLayout, calibration: CalibrationSet, expert: str) -> CallSize:
    """Size of an expert's recorded calls, from the first of them."""
    record = calibration.of_expert(expert)[0]
    channels, times, rows, columns = calibration.shape(record)
    latent = (channels, times, rows, columns)
    text, image = calibration.tokens(record)
    return CallSize(video_tokens(layout.experts[expert], latent), text, latent, image)


def measure_coverage(
    layout: ModelLayout, shards: dict[str, ShardSet], calibration: CalibrationSet, settings: QuantizeSettings
) -> Coverage:
    """Coverage over all experts. Linear parameters are 2-D weights of the experts (embedders and output included)."""
    fmt = formats.get(settings.format)
    linear = quantized = basis_bytes = 0
    flops = quantized_flops = 0.0
    for expert in layout.experts:
        call = recorded_call(layout, calibration, expert)
        rows = {
            f"{block_prefix(index)}{linear}.weight": item.rows
            for index in range(layout.num_blocks(expert))
            for item in layout.block_inputs(expert).values()
            for linear in item.linears
        }
        kept = tuple(block_prefix(index) for index in settings.high_precision.get(expert, ()))
        for name, entry in shards[expert].entries.items():
            if not name.endswith(".weight") or len(entry.shape) != 2:
                continue
            size = math.prod(entry.shape)
            tokens = call.rows(rows.get(name) or rows_outside(name))
            linear += size
            flops += 2.0 * size * tokens
            if name in rows and not name.startswith(kept):
                quantized += size
                basis_bytes += settings.spec.basis_bytes(entry.shape[1])
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
