"""evaluation.json: what two runs, or two result files, came to. The table, the reports and the archive read it from here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ptq.errors import DamagedFileError, PtqError
from ptq.store.evaluation_units import FILE as UNITS_FILE
from ptq.store.files import read_json, sha256_file
from ptq.store.lora import Loras
from ptq.store.schema import Count, Positive, Schema, Share, parse

FILE = "evaluation.json"
PASS: Literal["PASS"] = "PASS"
FAIL: Literal["FAIL"] = "FAIL"
INCONCLUSIVE: Literal["INCONCLUSIVE"] = "INCONCLUSIVE"
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
ROLES = ("reference", "candidate")
"""The two runs, and the names of their fields."""


class Estimate(Schema):
    """A value and its 95 % interval; `low` and `high` are None where the data cannot bound it."""

    value: float
    low: float | None
    high: float | None


class Dimension(Schema):
    """One dimension: means of both runs, relative loss (None where the reference scores 0), loss in points, units.

    points: 100 x difference of the scores.
    """

    reference: float
    candidate: float
    relative_loss: Estimate | None
    points: Estimate
    units: Count


class Summary(Schema):
    """A paired measure over the units that have it."""

    mean: float
    min: float
    max: float
    units: Count


class RunSide(Schema):
    """One of the two; `file` instead of `directory` where only VBench results were read."""

    directory: str | None = None
    file: str | None = None
    run_digest: str | None = None
    checkpoint_digest: str | None = None
    format: str | None = None
    model: str | None = None
    settings: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    lora: Loras = {}


class Bootstrap(Schema):
    """How the intervals were made."""

    resamples: Positive
    seed: int
    confidence: Share
    method: str


class Yardstick(Schema):
    """Another model's run against the same reference, on units of the comparison; no part of the verdict.

    run: that run. Its scores are the `candidate` of every dimension; the rest is as in `Evaluation`.
    """

    run: RunSide
    units: Count
    dimensions: dict[str, Dimension] = {}
    aggregates: dict[str, Estimate] = {}
    informative: dict[str, Dimension] = {}
    paired: dict[str, Summary] = {}
    warnings: list[str] = []


class Evaluation(Schema):
    """The whole file. `verdict`, `limit` and `gate` are None for suites without a gate and formats without a limit.

    excluded: unit -> why it is not in the comparison. overlap: evaluated prompts that the candidate was calibrated with, None
    where its checkpoint was not at hand. sources: what was measured -> units. dimensions, aggregates: of the
    gate. Beside it, where videos were measured: informative, paired, duplicates (role -> groups of equal videos), notes.
    vbench: versions, files and totals of VBench. yardstick: with --yardstick. units_sha256: of units.jsonl beside it (absent in earlier versions).
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    ptq_version: str
    suite: str
    format: str | None
    limit: Share | None
    gate: str | None
    bootstrap: Bootstrap
    reference: RunSide
    candidate: RunSide
    units: Count
    excluded: dict[str, str] = {}
    overlap: Count | None = None
    stride: Positive | None = None
    sources: dict[str, Count] = {}
    dimensions: dict[str, Dimension]
    aggregates: dict[str, Estimate]
    verdict: Verdict | None
    prompts: Count
    vbench: dict[str, Any] | None = None
    informative: dict[str, Dimension] = {}
    paired: dict[str, Summary] = {}
    duplicates: dict[str, list[list[str]]] = {}
    notes: list[str] = []
    warnings: list[str] = []
    yardstick: Yardstick | None = None
    units_sha256: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Evaluation:
        if self.verdict is not None and (self.limit is None or self.gate is None or self.format is None):
            raise ValueError("a verdict without limit, gate or format")
        if self.verdict in (PASS, FAIL) and self.deciding is None:
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
    path = Path(directory) / FILE
    if not path.is_file():
        raise PtqError(f"{directory} is not an evaluation directory: it has no {FILE}. Make one with `ptq evaluate`.")
    advice = "Nothing was written. Run `ptq evaluate` again into that directory."
    evaluation = parse(Evaluation, read_json(path), path, advice)
    units = path.with_name(UNITS_FILE)
    if evaluation.units_sha256 is not None and units.is_file() and sha256_file(units) != evaluation.units_sha256:
        raise DamagedFileError(f"{units} was changed since {FILE} was made from it. {advice}")
    return evaluation
