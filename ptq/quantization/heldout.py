"""Denoiser-output error of a packed checkpoint on records it was not calibrated on."""

from __future__ import annotations

from ptq.calibration.records import CalibrationSet
from ptq.checkpoint.shards import ShardSet
from ptq.errors import UsageError
from ptq.quantization.hybrid import HybridExpert
from ptq.wan.layout import ModelLayout
from ptq.wan.replay import ExpertReplay


def denoiser_errors(
    original: ModelLayout, packed: ModelLayout, records: CalibrationSet, device: str = "cpu"
) -> dict[str, float]:
    """Relative squared output error of each expert, and their mean under "mean".

    Args:
        original, packed: the model and its quantized checkpoint.
        records: made from `original`; use prompts that calibration did not see.

    Raises:
        UsageError: the two are not of one structure.
    """
    if list(original.experts) != list(packed.experts):
        raise UsageError(f"{original.path} and {packed.path} have different experts and cannot be compared.")
    errors = {}
    for expert in original.experts:
        replays = [
            ExpertReplay(ShardSet(layout.path / expert), layout.experts[expert], device)
            for layout in (original, packed)
        ]
        hybrid = HybridExpert(expert, replays[0], replays[1], records)
        errors[expert] = hybrid.error([True] * hybrid.num_blocks)
    errors["mean"] = sum(errors.values()) / len(errors)
    return errors
