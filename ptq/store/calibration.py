"""calibration.json, and a finished calibration directory as the stages after it read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import read_json, sha256_file
from ptq.store.lora import Loras, lora_identity
from ptq.store.records import IMAGE, INDEX_FILE, NEGATIVE_FILE, RECORDS_DIR, TEXT, Record, read_embeds
from ptq.store.schema import Count, NotNegative, PlainName, Positive, Schema, parse, parse_lines

if TYPE_CHECKING:
    from torch import Tensor

FILE = "calibration.json"


class Step(Schema):
    """One denoising step: timestep as the model sees it, noise level sigma, |change of sigma| made by this step."""

    index: Count
    timestep: NotNegative
    sigma: NotNegative
    d_sigma: NotNegative
    expert: PlainName


class RecordedSample(Schema):
    """A prompt of the set; the digest of its caption tells whether another set shares it."""

    dataset: str
    id: str
    caption_digest: str


class CalibrationInfo(Schema):
    """The whole file.

    experts: name -> digest of its configuration. preset: sizes, steps and guidance (`ptq.config.ModelPreset`).
    prompts: name and sha256 of the prompt file. image_policy: how images were fitted, None for text-to-video.
    schedule: all steps of the sampler; absent until the first record is made.
    lora: expert -> LoRA that was merged into it.
    files: name -> sha256 of every record file and the negative embedding, each noted when the file was made (earlier
    versions: at the end), and at the end of the index; digest: over all of it.
    """

    variant: str
    experts: dict[PlainName, str]
    preset: dict[str, Any]
    prompts: dict[str, str]
    samples: list[RecordedSample]
    records_per_prompt: Positive
    seed: Count
    image_policy: str | None = None
    lora: Loras = {}
    schedule: list[Step] = []
    complete: bool = False
    files: dict[PlainName, str] = {}
    digest: str | None = None

    def decisive(self) -> dict[str, Any]:
        """What must agree before two processes may record into one directory."""
        settings = self.model_dump(mode="json", exclude={"schedule", "complete", "files", "digest", "lora"})
        return settings | lora_identity(self.lora)


def read_calibration(path: Path) -> CalibrationInfo:
    """Read a calibration.json.

    Raises:
        PtqError: it does not exist. DamagedFileError: it is not one of this package.
    """
    advice = "Restore it, or record again with `ptq calibrate --fresh`."
    return parse(CalibrationInfo, read_json(path), path, advice)


class DenoiserCall(NamedTuple):
    """What the denoiser is called with, under its own argument names and with batch dimension.

    hidden_states [R, C, T, H, W]; timestep [R] or [R, tokens]; encoder_hidden_states [R, L, D] of the text encoder;
    encoder_hidden_states_image [R, L', D'] of the image encoder, for the models that take it. R is 1 as recorded.
    """

    hidden_states: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    encoder_hidden_states_image: Tensor | None = None


class CalibrationSet:
    """A finished calibration directory.

    Raises:
        PtqError: not a calibration directory, or recording has not finished.
        DamagedFileError: a record file is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / FILE).exists():
            raise PtqError(
                f"{self.directory} is not a calibration directory (no {FILE}). Make one with `ptq calibrate`."
            )
        self.info = read_calibration(self.directory / FILE)
        if not self.info.complete or self.info.digest is None:
            raise PtqError(
                f"Recording into {self.directory} has not finished. Run the same `ptq calibrate` command again; it goes on where it stopped."
            )
        self.digest = self.info.digest
        """Of settings and record bytes; part of the signature of everything made from this set."""
        self.records = self._read_index()

    def _read_index(self) -> list[Record]:
        index = self.directory / INDEX_FILE
        if not index.exists() or sha256_file(index) != self.info.files.get(INDEX_FILE):
            raise DamagedFileError(
                f"{index} is missing or was changed since recording finished. Run the same `ptq calibrate` command again; it writes the index anew from the record files."
            )
        return parse_lines(Record, index, "Run the same `ptq calibrate` command again; it writes the index anew.")

    def of_expert(self, expert: str) -> list[Record]:
        """The records of one expert."""
        return [record for record in self.records if record.expert == expert]

    def shape(self, record: Record) -> tuple[int, ...]:
        """Latent shape [C, T, H, W] of a record, without reading it."""
        return self._shapes(record, record.file)[f"{record.record}.hidden_states"]

    def tokens(self, record: Record) -> tuple[int, int]:
        """Numbers of text and image tokens that the denoiser reads in this record."""
        shapes = self._shapes(record, record.file)
        text = shapes if record.branch == "cond" else self._shapes(record, NEGATIVE_FILE)
        return text[TEXT][0], shapes[IMAGE][0] if IMAGE in shapes else 0

    def _shapes(self, record: Record, file: str) -> dict[str, tuple[int, ...]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.directory / file, framework="pt") as handle:
                return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise self._unreadable(record, self.directory / file, error) from error

    def verify(self) -> None:
        """Compare every file with its digest: everything made from this set is signed with those digests.

        Raises:
            DamagedFileError: a file is missing or was changed since recording; names it.
        """
        for name, expected in self.info.files.items():
            path = self.directory / (name if name in (INDEX_FILE, NEGATIVE_FILE) else f"{RECORDS_DIR}/{name}")
            if not path.exists() or sha256_file(path) != expected:
                raise DamagedFileError(
                    f"{path} is missing or was changed since recording finished. Run the same `ptq calibrate` command again; it records what is missing or damaged."
                )

    def load(self, record: Record) -> DenoiserCall:
        """Read one record's tensors (stored dtypes, CPU).

        Raises:
            DamagedFileError: missing or damaged file; names it and the record.
        """
        from safetensors import SafetensorError, safe_open

        path = self.directory / record.file
        embeds_path = path if record.branch == "cond" else self.directory / NEGATIVE_FILE
        try:
            with safe_open(path, framework="pt") as handle:
                hidden = handle.get_tensor(f"{record.record}.hidden_states")
                timestep = handle.get_tensor(f"{record.record}.timestep")
                image = handle.get_tensor(IMAGE).unsqueeze(0) if IMAGE in set(handle.keys()) else None
        except (SafetensorError, OSError) as error:
            raise self._unreadable(record, path, error) from error
        embeds = read_embeds(embeds_path)
        if embeds is None:
            raise self._unreadable(record, embeds_path, "its text embedding is missing or damaged")
        return DenoiserCall(hidden.unsqueeze(0), timestep, embeds.unsqueeze(0), image)

    @staticmethod
    def _unreadable(record: Record, path: Path, error: object) -> DamagedFileError:
        return DamagedFileError(
            f"Record {record.record} could not be read from {path} ({error}). Run the same `ptq calibrate` command again to record it anew."
        )

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)
