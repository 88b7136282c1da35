"""LoRAs that were merged into a model, as the artifacts of every stage name them: expert -> which file, how strongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from ptq.store.schema import PlainName, Schema


class LoraInfo(Schema):
    """One file in one expert.

    name, sha256: of the file. strength: factor of its low-rank product. path: where the file was; where it lies now, and
    what it is called, is no part of what was merged.
    """

    name: Annotated[str, Field(pattern=r"^[^/]+$", max_length=255)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    strength: float
    path: str | None = None


Loras = dict[PlainName, LoraInfo]
"""Expert -> LoRA."""


class LoraTable(Schema):
    """The entry of an artifact that is read without the rest of it."""

    lora: Loras


def lora_identity(loras: Mapping[str, LoraInfo]) -> dict[str, Any]:
    """What decides the weights, for digests and comparisons; as an entry of a larger object, absent without LoRAs."""
    return {"lora": {name: [one.sha256, one.strength] for name, one in sorted(loras.items())}} if loras else {}


def without_paths(loras: Mapping[str, LoraInfo]) -> dict[str, LoraInfo]:
    """As artifacts keep them that travel to other machines."""
    return {expert: LoraInfo(name=one.name, sha256=one.sha256, strength=one.strength) for expert, one in loras.items()}


def describe_loras(loras: Mapping[str, LoraInfo]) -> str:
    """One phrase for people."""
    return "; ".join(
        f"{expert}: {one.name} at strength {one.strength:g} (sha256 {one.sha256[:12]})" for expert, one in loras.items()
    )
