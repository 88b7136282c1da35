"""Records on disk: one safetensors file a prompt, written atomically; records.jsonl and calibration.json around them.

A record is what the denoiser was *called with* (latents, timestep, text embedding), about 8 MB at 480p x 81 frames, not
an activation (335 MB for one block input). Everything a replay needs and nothing that depends on the weights.

A file's header carries the same lines as records.jsonl, so the index can always be rebuilt from the files that exist;
that is how a killed or sharded run resumes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq.checkpoint.safetensors_file import read_header
from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import atomic_path, read_json, read_jsonl, sha256_file, write_bytes

SETTINGS_FILE = "calibration.json"
INDEX_FILE = "records.jsonl"
NEGATIVE_FILE = "negative.safetensors"
RECORDS_DIR = "records"
BRANCHES = ("cond", "uncond")
"""The sampler's calls of one step, in order."""
TEXT, IMAGE = "prompt_embeds", "image_embeds"
"""Tensors of a prompt's file that its records share: the text embedding [L, D], and where the model reads image tokens, those."""


@dataclass(frozen=True)
class Record:
    """One denoiser call.

    Attributes:
        record: name, "<prompt index>-<step>-<branch>".
        file: safetensors file, relative to the calibration directory.
        sample_id: the prompt.
        expert, step, timestep, sigma, d_sigma: see `schedule.Step`.
        branch: "cond" or "uncond" (negative prompt).
    """

    record: str
    file: str
    sample_id: str
    expert: str
    step: int
    timestep: float
    sigma: float
    d_sigma: float
    branch: str


@dataclass(frozen=True)
class RecordTensors:
    """Inputs of one call with batch dimension: hidden_states [1, C, T, H, W], timestep [1] or [1, tokens],
    encoder_hidden_states [1, L, D], and encoder_hidden_states_image [1, L', D'] where the model takes it."""

    hidden_states: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    encoder_hidden_states_image: Tensor | None = None


def prompt_file(directory: Path, index: int) -> Path:
    """File of the prompt at position `index`."""
    return directory / RECORDS_DIR / f"{index:05d}.safetensors"


def write_prompt(path: Path, records: Sequence[Record], tensors: dict[str, Tensor]) -> None:
    """Write all records of one prompt: "<record>.hidden_states", "<record>.timestep", and what the records share."""
    save_atomic(tensors, path, {"records": json.dumps([asdict(record) for record in records])})


def save_atomic(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors.torch.save_file under a temporary name, then rename.

    Raises:
        PtqError: the disk is full or not writable.
    """
    with atomic_path(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(None, str(error)) from error


def read_prompt_records(path: Path) -> list[Record] | None:
    """The records of a finished prompt file, or None when it is absent or damaged (it is then recorded again)."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            lines = json.loads((handle.metadata() or {})["records"])
            names = set(handle.keys())
        records = [Record(**line) for line in lines]
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    return records if all(f"{record.record}.hidden_states" in names for record in records) else None


def read_embeds(path: Path) -> Tensor | None:
    """Text embedding [L, D] of a prompt or negative file, or None when it is absent or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            return handle.get_tensor(TEXT)
    except SafetensorError:
        return None


def write_index(directory: Path, records: Sequence[Record]) -> None:
    """Write records.jsonl atomically."""
    lines = [json.dumps(asdict(record), ensure_ascii=False) for record in records]
    write_bytes(directory / INDEX_FILE, ("\n".join(lines) + "\n").encode())


class CalibrationSet:
    """A finished calibration directory.

    Raises:
        PtqError: not a calibration directory, or recording has not finished.
        DamagedFileError: a record file is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / SETTINGS_FILE).exists():
            raise PtqError(
                f"{self.directory} is not a calibration directory (no {SETTINGS_FILE}). Make one with `ptq calibrate`."
            )
        self.settings: dict[str, Any] = read_json(self.directory / SETTINGS_FILE)
        if not self.settings.get("complete"):
            raise PtqError(
                f"Recording into {self.directory} has not finished. Run the same `ptq calibrate` command again; it goes on where it stopped."
            )
        index = self.directory / INDEX_FILE
        if not index.exists() or sha256_file(index) != self.settings["files"].get(INDEX_FILE):
            raise DamagedFileError(
                f"{index} is missing or was changed since recording finished. Run the same `ptq calibrate` command again; it writes the index anew from the record files."
            )
        lines = read_jsonl(index)
        try:
            self.records = [Record(**line) for line in lines]
        except TypeError as error:
            raise DamagedFileError(f"{index} holds a line that is no record ({error}).") from error

    @property
    def digest(self) -> str:
        """Digest of settings and record bytes; part of the signature of everything made from this set."""
        return str(self.settings["digest"])

    @property
    def sample_ids(self) -> list[str]:
        """Prompts in the set, in order."""
        return list(dict.fromkeys(record.sample_id for record in self.records))

    def of_expert(self, expert: str) -> list[Record]:
        """The records of one expert."""
        return [record for record in self.records if record.expert == expert]

    def shape(self, record: Record) -> tuple[int, ...]:
        """Latent shape [C, T, H, W] of a record, without reading it."""
        return read_header(self.directory / record.file)[f"{record.record}.hidden_states"].shape

    def tokens(self, record: Record) -> tuple[int, int]:
        """Numbers of text and image tokens that the denoiser reads in this record."""
        header = read_header(self.directory / record.file)
        return header[TEXT].shape[0], header[IMAGE].shape[0] if IMAGE in header else 0

    def verify(self) -> None:
        """Compare every file with its digest: everything made from this set is signed with those digests.

        Raises:
            DamagedFileError: a file is missing or was changed since recording; names it.
        """
        for name, expected in self.settings["files"].items():
            path = self.directory / (name if name in (INDEX_FILE, NEGATIVE_FILE) else f"{RECORDS_DIR}/{name}")
            if not path.exists() or sha256_file(path) != expected:
                raise DamagedFileError(
                    f"{path} is missing or was changed since recording finished. Run the same `ptq calibrate` command again; it records what is missing or damaged."
                )

    def load(self, record: Record) -> RecordTensors:
        """Read one record's tensors (stored dtypes, CPU).

        Raises:
            DamagedFileError: missing or damaged file; names it and the record.
        """
        path = self.directory / record.file
        embeds_path = path if record.branch == "cond" else self.directory / NEGATIVE_FILE
        try:
            with safe_open(path, framework="pt") as handle:
                hidden = handle.get_tensor(f"{record.record}.hidden_states")
                timestep = handle.get_tensor(f"{record.record}.timestep")
                image = handle.get_tensor(IMAGE).unsqueeze(0) if IMAGE in set(handle.keys()) else None
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(
                f"Record {record.record} could not be read from {path} ({error}). Run the same `ptq calibrate` command again to record it anew."
            ) from error
        embeds = read_embeds(embeds_path)
        if embeds is None:
            raise DamagedFileError(
                f"The text embedding of record {record.record} could not be read from {embeds_path}. Run the same `ptq calibrate` command again to record it anew."
            )
        return RecordTensors(hidden.unsqueeze(0), timestep, embeds.unsqueeze(0), image)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)
