"""run.json of a generation directory: what every unit of the run shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ptq.errors import PtqError
from ptq.store.files import read_json
from ptq.store.lora import Loras
from ptq.store.schema import Count, Positive, Schema, parse

FILE = "run.json"


class CheckpointInfo(Schema):
    """Digest of the weights, and the number format of a packed checkpoint (None: unquantized)."""

    digest: str | None = None
    format: str | None = None


class RunPlan(Schema):
    """What the run was last started for, for `ptq status`; no part of the digest.

    prompts: where the samples come from (file, format, sha256, samples). fixed_latent: file of the one initial latent.
    """

    units: Count = 0
    samples_per_prompt: Positive = 1
    shards: Positive = 1
    prompts: dict[str, Any] | None = None
    fixed_latent: str | None = None


class RunInfo(Schema):
    """The whole file. settings: fields of `ptq.generation.Settings`. digest: over all that decides pixels.

    lora: expert -> LoRA in its weights, merged for this run or before they were quantized.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: str | None = None
    checkpoint: CheckpointInfo = CheckpointInfo()
    lora: Loras = {}
    dataset: str | None = None
    settings: dict[str, str | int | float | bool | None] = {}
    versions: dict[str, str] = {}
    digest: str
    not_applied: str = ""
    plan: RunPlan = RunPlan()


def read_run_info(directory: Path) -> RunInfo:
    """Raises:
    PtqError: `directory` has no run.json. DamagedFileError: it is not one of this package."""
    path = directory / FILE
    if not path.is_file():
        raise PtqError(
            f"{directory} is not a generation directory: it has no {FILE}. Give the --out directory of `ptq generate`."
        )
    advice = "Nothing was changed. Restore it, or generate into another --out."
    return parse(RunInfo, read_json(path), path, advice)
