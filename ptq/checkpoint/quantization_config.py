"""The `quantization_config` object of a component's config.json: a strict model of what specs/checkpoint fixes.

Explicit targets times explicit protected blocks; nothing is inferred from tensor names. A Hadamard rotation is a rule, not
stored matrices; a learned transform is stored with each layer. An unknown key, format or version is an error, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ptq import formats
from ptq.errors import PtqError
from ptq.runtime.spec import QuantSpec

QUANT_METHOD: Final = "ptq"
FORMAT_VERSION: Final = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightsConfig(_Strict):
    """Layout of weight_packed and weight_scale."""

    group_size: int
    nibble_order: Literal["low_first"] = "low_first"
    scale_layout: str


class ActivationsConfig(_Strict):
    """Dynamic quantization of the inputs."""

    format: str
    dynamic: Literal[True] = True
    scale_rule: str
    ties: str


class TransformConfig(_Strict):
    """The change of basis of every target: smooth, then block Hadamard; or learned blocks in place of both."""

    type: Literal["hadamard", "learned", "none"]
    block_size: Literal[0, 16, 32, 64, 128]
    smooth: bool


class PackedConfig(_Strict):
    """What config.json says about a packed transformer."""

    quant_method: Literal["ptq"] = QUANT_METHOD
    format_version: Literal[1] = FORMAT_VERSION
    format: Literal["mxfp4", "hif4"]
    weights: WeightsConfig
    input_activations: ActivationsConfig
    targets: tuple[str, ...]
    high_precision_blocks: tuple[int, ...] = ()
    transform: TransformConfig

    @classmethod
    def build(cls, spec: QuantSpec, targets: Iterable[str], high_precision_blocks: Iterable[int] = ()) -> PackedConfig:
        """The configuration of a component whose `targets` all have the numerics of `spec`."""
        fmt = formats.get(spec.format)
        return cls(
            format=spec.format,  # type: ignore[arg-type]  # validated by pydantic
            weights=WeightsConfig(group_size=fmt.group_size, scale_layout=fmt.scale_layout),
            input_activations=ActivationsConfig(
                format=spec.format,
                scale_rule=spec.scale_rule or fmt.scale_rules[0],
                ties=spec.ties or fmt.ties_options[0],
            ),
            targets=tuple(targets),
            high_precision_blocks=tuple(sorted(high_precision_blocks)),
            transform=TransformConfig(
                type="learned" if spec.learned else "hadamard" if spec.rotation else "none",
                block_size=spec.rotation,  # type: ignore[arg-type]  # validated by pydantic
                smooth=spec.smooth,
            ),
        )

    @classmethod
    def parse(cls, value: dict[str, Any], where: str = "config.json") -> PackedConfig:
        """Validate a dictionary read from disk.

        Raises:
            PtqError: another format version, unknown keys or values; the text names them.
        """
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise PtqError(
                f"{where} has quantization format_version {version!r}; this version of wan-ptq reads {FORMAT_VERSION}. Upgrade wan-ptq, or quantize the model again."
            )
        try:
            config = cls.model_validate(value)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise PtqError(f"{where} has a quantization_config that this version cannot read: {problems}.") from error
        fmt = formats.get(config.format)
        if (config.weights.group_size, config.weights.scale_layout) != (fmt.group_size, fmt.scale_layout):
            raise PtqError(
                f"{where} declares {config.format} weights with group size {config.weights.group_size} and layout {config.weights.scale_layout}; {config.format} has {fmt.group_size} and {fmt.scale_layout}."
            )
        config._check_consistency(where)
        return config

    def _check_consistency(self, where: str) -> None:
        fmt, inputs, transform = formats.get(self.format), self.input_activations, self.transform
        problems = []
        if inputs.format != self.format:
            problems.append(f"inputs in {inputs.format} with weights in {self.format}")
        if inputs.scale_rule not in fmt.scale_rules:
            problems.append(f"the scale rule {inputs.scale_rule!r}")
        if inputs.ties not in fmt.ties_options:
            problems.append(f"the ties option {inputs.ties!r}")
        if (transform.type == "none") != (transform.block_size == 0):
            problems.append(f"a transform of type {transform.type} with block size {transform.block_size}")
        if problems:
            raise PtqError(f"{where} asks for {' and for '.join(problems)}, which this version cannot run.")
        try:
            _ = self.spec
        except formats.FormatError as error:
            raise PtqError(f"{where}: {error}") from error

    @property
    def spec(self) -> QuantSpec:
        """The numerics of every target layer."""
        return QuantSpec(
            format=self.format,
            rotation=self.transform.block_size,
            smooth=self.transform.smooth,
            scale_rule=self.input_activations.scale_rule,
            ties=self.input_activations.ties,
            learned=self.transform.type == "learned",
        )

    def layer_names(self, module_names: Iterable[str]) -> list[str]:
        """Names among `module_names` that are quantized: "<list>.<block>.<target>" outside the protected blocks."""
        pattern = re.compile(r"(?:.+\.)?(\d+)\.(" + "|".join(map(re.escape, self.targets)) + ")")
        matches = ((name, pattern.fullmatch(name)) for name in module_names)
        return [name for name, match in matches if match and int(match[1]) not in self.high_precision_blocks]
