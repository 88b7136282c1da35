"""What a packed checkpoint can be exported to, and what a request for it is checked against before torch is loaded.

A target is refused where its tool would compute another product than the checkpoint's; what could be exact is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.errors import UsageError


@dataclass(frozen=True)
class Target:
    """format: the one that the target takes, None: any. input_rule: the scale rule by which its tool quantizes inputs, None where
    that is not known or inputs are not quantized. exact: what of the product is the checkpoint's there."""

    format: str | None
    input_rule: str | None
    exact: str


TARGETS = {
    "compressed-tensors": Target("mxfp4", "even", "weights and inputs are those of this checkpoint"),
    "msmodelslim": Target(
        "hif4", None, "weights are those of this checkpoint; by which rule inputs are quantized is the tool's"
    ),
    "bf16": Target(None, None, "weights are those of this checkpoint, rounded to bfloat16; inputs are not quantized"),
}
"""Name -> target. compressed-tensors scales inputs as rule `even` does, bit for bit (tested with its own code)."""
DENSE = "bf16"
"""The target that takes every checkpoint."""


def check_target(target: str) -> None:
    """Raise UsageError where there is no such target."""
    if target not in TARGETS:
        raise UsageError(f"--to takes one of {', '.join(TARGETS)}, found {target!r}.")


def check_exact(config: Mapping[str, Any], target: str) -> None:
    """Refuse what the target's tool would compute otherwise.

    Args:
        config: `quantization_config` of a packed expert, as it stands in its config.json.

    Raises:
        UsageError: no such target, or another format, transform or rule of inputs; says what would be exact.
    """
    check_target(target)
    taken, found = TARGETS[target], str(config.get("format"))
    if taken.format not in (None, found):
        fitting = [name for name, one in TARGETS.items() if one.format in (None, found) and not _changes(config, name)]
        raise UsageError(
            f"{target} takes {taken.format} checkpoints, this one is {found}. Use --to {' or '.join(fitting)}."
        )
    changes = _changes(config, target)
    if changes:
        raise UsageError(
            f"An export to {target} would not be exact: {' and '.join(changes)}. Quantize once more with {' '.join(f'--set {one}' for one in changes.values())} to export it, or use --to {DENSE}."
        )


def _changes(config: Mapping[str, Any], target: str) -> dict[str, str]:
    """What the tool of a target cannot do as this checkpoint does -> the recipe key with which it could.

    What is no configuration of this package is passed over: who reads the layers names it.
    """
    taken, changes = TARGETS[target], {}
    transform, inputs = (
        value if isinstance(value := config.get(key), dict) else {} for key in ("transform", "input_activations")
    )
    kind = "smoothed" if transform.get("smooth") else transform.get("type")
    if target != DENSE and kind not in (None, "none"):
        size = f", blocks of {transform.get('block_size')}" if transform.get("block_size") else ""
        changes[f"inputs change their basis at run time (transform {kind}{size}), which it cannot do"] = (
            "scheme.transform=none"
        )
    if target != DENSE and config.get("residual") is not None:
        changes["some inputs are multiplied with their residuals (residual blocks), which it cannot do"] = (
            "solver.residual=0"
        )
    rule = inputs.get("scale_rule")
    if taken.input_rule not in (None, rule):
        changes[f"inputs are scaled by the rule {rule}, and there by {taken.input_rule}"] = (
            f"scheme.input_rule={taken.input_rule}"
        )
    return changes


def refuse_existing(out: Path) -> None:
    """Raise UsageError where the directory to write is there."""
    if out.exists():
        raise UsageError(f"{out} exists already; choose another --out.")
