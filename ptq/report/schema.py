"""The parts of evaluation.json that a report shows, checked while reading: a damaged file must not become a report.

Written by `ptq.evaluation.evaluate`; unknown keys are ignored, so that a newer evaluation stays readable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import read_json

EVALUATION_FILE = "evaluation.json"
UNITS_FILE = "units.jsonl"


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Estimate(_Read):
    """A value and its interval; no interval where the data cannot bound it."""

    value: float
    low: float | None
    high: float | None


class Dimension(_Read):
    """One dimension of both runs; `relative_loss` is None where the reference scores 0."""

    reference: float
    candidate: float
    relative_loss: Estimate | None
    points: Estimate
    units: int


class Summary(_Read):
    """A paired measure over the units that have it."""

    mean: float
    min: float
    max: float
    units: int


class RunInfo(_Read):
    """One run; `file` instead of `directory` where only VBench results were read."""

    directory: str | None = None
    file: str | None = None
    run_digest: str | None = None
    checkpoint_digest: str | None = None
    format: str | None = None
    model: str | None = None
    settings: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None


class Bootstrap(_Read):
    """How the intervals were made."""

    resamples: int
    seed: int
    confidence: float
    method: str


class Evaluation(_Read):
    """evaluation.json. `verdict`, `limit` and `gate` are None for suites without a gate."""

    ptq_version: str
    suite: str
    format: str | None
    limit: float | None
    gate: str | None
    bootstrap: Bootstrap
    reference: RunInfo
    candidate: RunInfo
    units: int
    prompts: int
    excluded: dict[str, str] = {}
    stride: int | None = None
    sources: dict[str, int] = {}
    dimensions: dict[str, Dimension]
    aggregates: dict[str, Estimate]
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"] | None
    informative: dict[str, Dimension] = {}
    paired: dict[str, Summary] = {}
    vbench: dict[str, Any] | None = None
    warnings: list[str] = []
    notes: list[str] = []

    @model_validator(mode="after")
    def _complete(self) -> Evaluation:
        if self.verdict is not None and (self.limit is None or self.gate is None or self.format is None):
            raise ValueError("a verdict without limit, gate or format")
        if self.verdict in ("PASS", "FAIL") and self.deciding is None:
            raise ValueError(f"the verdict {self.verdict} without the aggregate {self.gate} that decided it")
        return self

    @property
    def deciding(self) -> Estimate | None:
        """The aggregate that decides."""
        return None if self.gate is None else self.aggregates.get(self.gate)


def read_evaluation(directory: str | Path) -> Evaluation:
    """Read and check an evaluation directory's evaluation.json.

    Raises:
        PtqError: there is none. DamagedFileError: it is no evaluation, or was edited into something else.
    """
    path = Path(directory) / EVALUATION_FILE
    if not path.is_file():
        raise PtqError(
            f"{directory} is not an evaluation directory: it has no {EVALUATION_FILE}. Make one with `ptq evaluate`."
        )
    content = read_json(path)
    try:
        return Evaluation.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:4])
        raise DamagedFileError(
            f"{path} is not an evaluation that this version can read: {problems}. Nothing was written. Run `ptq evaluate` again into that directory."
        ) from error
