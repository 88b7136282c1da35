"""What `ptq quantize --dry-run` prints: sizes, records, memory and disk, before anything is spent."""

from __future__ import annotations

from ptq import formats
from ptq.calibration.records import CalibrationSet
from ptq.checkpoint.shards import ShardSet
from ptq.quantization.coverage import measure_coverage, tokens_of
from ptq.quantization.run import check_inputs
from ptq.quantization.settings import QuantizeSettings
from ptq.wan.structure import ModelLayout


def describe_plan(layout: ModelLayout, calibration: CalibrationSet, settings: QuantizeSettings) -> dict[str, str]:
    """Name -> value. Checks the inputs as the run would.

    Raises:
        PtqError: whatever would stop the run before its first block.
    """
    check_inputs(layout, calibration, settings)
    shards = {expert: ShardSet(layout.path / expert) for expert in layout.experts}
    coverage = measure_coverage(layout, shards, calibration, settings)
    plan = {"model": f"{layout.path} ({layout.preset.variant})", "format": formats.get(settings.format).name}
    for expert, config in layout.experts.items():
        records = calibration.of_expert(expert)
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        tokens = tokens_of(calibration, records[0], config)
        streams = 2 * 4 * width * tokens * len(records)
        plan[expert] = (
            f"{layout.num_blocks(expert)} blocks, {len(records)} records of {tokens} tokens, "
            f"hidden states {streams / 1e9:.2f} GB"
        )
    unchanged = coverage.original_bytes - sum(
        entry.nbytes
        for shard in shards.values()
        for name, entry in shard.entries.items()
        if name.endswith(".weight") and ".blocks." in f".{name}" and len(entry.shape) == 2
    )
    plan["recipe"] = f"{settings.recipe_name}: {settings.recipe.description}"
    plan["weights before"] = f"{coverage.original_bytes / 1e9:.3f} GB"
    plan["weights after"] = f"{(coverage.quantized_bytes + unchanged) / 1e9:.3f} GB"
    plan["W4A4 share of Linear parameters"] = f"{coverage.parameter_share:.2%}"
    return plan
