"""The `quantization_config` object of a component's config.json: the scheme, and which layers have it.

Explicit targets times explicit protected blocks; nothing is inferred from tensor names. An unknown key, format or version
is an error, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ptq.errors import FormatError, PtqError
from ptq.known import RESIDUAL_BLOCK
from ptq.scheme import Scheme
from ptq.scheme.residual import check_blocks

QUANT_METHOD: Final = "ptq"
FORMAT_VERSION: Final = 1


class _Residual(BaseModel):
    """Layer -> the numbers of its input blocks that have a residual; layers without one are not named."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    block_size: Literal[RESIDUAL_BLOCK] = RESIDUAL_BLOCK  # type: ignore[valid-type]
    layers: dict[str, Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]]


class _Layers(BaseModel):
    """The keys besides the scheme's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    quant_method: Literal["ptq"] = QUANT_METHOD
    format_version: Literal[1] = FORMAT_VERSION
    targets: tuple[str, ...] = Field(strict=False, min_length=1)
    high_precision_blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), strict=False)
    residual: _Residual | None = None


@dataclass(frozen=True)
class PackedConfig:
    """What config.json says about a packed transformer.

    Attributes:
        scheme: the numerics of every quantized layer.
        targets: names of the quantized Linears of a block.
        high_precision_blocks: blocks that are as in the original, ascending.
        residual: layer -> numbers of its residual blocks (`ptq.scheme.residual`), of those that have some; None where the
            recipe gave none to any layer.
    """

    scheme: Scheme
    targets: tuple[str, ...]
    high_precision_blocks: tuple[int, ...] = ()
    residual: Mapping[str, tuple[int, ...]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary, as found in config.json."""
        residual = None if self.residual is None else _Residual(layers=dict(self.residual))
        layers = _Layers(
            targets=self.targets, high_precision_blocks=self.high_precision_blocks, residual=residual
        )  # absent where there is none: earlier versions read it
        return layers.model_dump(mode="json", exclude_none=True) | self.scheme.to_config()

    @classmethod
    def parse(cls, value: Mapping[str, Any], where: str = "config.json") -> PackedConfig:
        """Validate a dictionary read from disk.

        Raises:
            PtqError: another format version, unknown keys or values, what this version cannot run; the text names them.
        """
        if not isinstance(value, Mapping):
            raise PtqError(f"{where} should hold an object under quantization_config, found {type(value).__name__}.")
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise PtqError(
                f"{where} has quantization format_version {version!r}; this version of wan-ptq reads {FORMAT_VERSION}. Upgrade wan-ptq, or quantize the model again."
            )
        own = _Layers.model_fields
        try:
            layers = _Layers.model_validate({key: item for key, item in value.items() if key in own})
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise PtqError(f"{where} has a quantization_config that this version cannot read: {problems}.") from error
        scheme = Scheme.from_config({key: item for key, item in value.items() if key not in own}, where)
        residual = None if layers.residual is None else dict(layers.residual.layers)
        return cls(scheme, layers.targets, layers.high_precision_blocks, residual)

    def residual_of(self, name: str, k: int) -> tuple[int, ...] | None:
        """The residual blocks of a layer with K input channels.

        Raises:
            PtqError: blocks that K does not have, not ascending, or twice.
        """
        if self.residual is None:
            return None
        blocks = self.residual.get(name, ())
        try:
            check_blocks(blocks, k)
        except FormatError as error:
            raise PtqError(f"quantization_config, {name}: {error}") from error
        return blocks

    def layer_names(self, module_names: Iterable[str]) -> list[str]:
        """Names among `module_names` that are quantized: "<list>.<block>.<target>" outside the protected blocks."""
        pattern = re.compile(r"(?:.+\.)?(\d+)\.(" + "|".join(map(re.escape, self.targets)) + ")")
        matches = ((name, pattern.fullmatch(name)) for name in module_names)
        return [name for name, match in matches if match and int(match[1]) not in self.high_precision_blocks]
