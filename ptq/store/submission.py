"""submission.json: what an archive claims about itself, in one look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from ptq.store.evaluation import Verdict
from ptq.store.files import read_json
from ptq.store.schema import Schema, Share, parse

FILE = "submission.json"


class SubmissionInfo(Schema):
    """The whole file. failing_gate_allowed: packed although the verdict is not PASS. high_precision: expert:block."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    format: str
    variant: str
    checkpoint_digest: str
    verdict: Verdict | None
    failing_gate_allowed: bool
    limit: Share | None
    high_precision: list[str]
    budget_scope: str

    def as_bytes(self) -> bytes:
        """The file, its keys sorted."""
        return (json.dumps(self.as_json(), indent=2, sort_keys=True) + "\n").encode()


def read_submission(directory: Path) -> SubmissionInfo:
    """Read the file of an unpacked archive.

    Raises:
        PtqError: there is none. DamagedFileError: it is not one of this package.
    """
    path = directory / FILE
    return parse(SubmissionInfo, read_json(path), path, "Pack again with `ptq package`.")
