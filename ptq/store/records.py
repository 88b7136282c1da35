"""Records on disk: one safetensors file a prompt, written atomically, and records.jsonl, the index over them.

A record is what the denoiser was *called with* (latents, timestep, text embedding), about 8 MB at 480p x 81 frames, not
an activation (335 MB for one block input). Everything a replay needs and nothing that depends on the weights.

A file's header carries the same lines as records.jsonl, so the index can always be rebuilt from the files that exist;
that is how a killed or sharded run resumes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ptq.store.files import write_jsonl, write_tensors
from ptq.store.schema import Count, NotNegative, PlainName, Schema
from ptq.store.strict_json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX_FILE = "records.jsonl"
NEGATIVE_FILE = "negative.safetensors"
RECORDS_DIR = "records"
BRANCHES: tuple[Literal["cond"], Literal["uncond"]] = ("cond", "uncond")
"""The sampler's calls of one step, in order."""
TEXT, IMAGE = "prompt_embeds", "image_embeds"
"""Tensors of a prompt's file that its records share: the text embedding [L, D], and where the model reads image tokens, those."""


class Record(Schema):
    """One denoiser call.

    Attributes:
        record: name, "<prompt index>-<step>-<branch>".
        file: safetensors file, relative to the calibration directory.
        sample_id: the prompt.
        expert, step, timestep, sigma, d_sigma: see `ptq.store.calibration.Step`.
        branch: "cond" or "uncond" (negative prompt).
    """

    record: PlainName
    file: Annotated[str, Field(pattern=rf"^{RECORDS_DIR}/[0-9]+\.safetensors$")]
    sample_id: str
    expert: PlainName
    step: Count
    timestep: NotNegative
    sigma: NotNegative
    d_sigma: NotNegative
    branch: Literal["cond", "uncond"]


def prompt_file(directory: Path, index: int) -> Path:
    """File of the prompt at position `index`."""
    return directory / RECORDS_DIR / f"{index:05d}.safetensors"


def write_prompt(path: Path, records: Sequence[Record], tensors: dict[str, Tensor]) -> None:
    """Write all records of one prompt: "<record>.hidden_states", "<record>.timestep", and what the records share."""
    write_tensors(path, tensors, {"records": json.dumps([record.as_json() for record in records])})


def read_prompt_records(path: Path) -> list[Record] | None:
    """The records of a finished prompt file, or None when it is absent or damaged (it is then recorded again)."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            lines = parse_json((handle.metadata() or {})["records"].encode())
            names = set(handle.keys())
        records = [Record.model_validate(line) for line in lines]
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    return records if all(f"{record.record}.hidden_states" in names for record in records) else None


def read_embeds(path: Path) -> Tensor | None:
    """Text embedding [L, D] of a prompt or negative file, or None when it is absent or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            return handle.get_tensor(TEXT)
    except SafetensorError:
        return None


def write_index(directory: Path, records: Sequence[Record]) -> None:
    """Write records.jsonl atomically."""
    write_jsonl(directory / INDEX_FILE, (record.as_json() for record in records))
