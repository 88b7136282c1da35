"""What tests of packages share beside fixtures."""

from __future__ import annotations

import shutil
from pathlib import Path

from ptq.store.files import read_json, write_json


def copy_measured(run: Path, target: Path, *, units: int) -> Path:
    """A run of the first few units, as if no more had been asked for."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("state"))
    manifest = next(target.glob("manifest-*.jsonl"))
    lines = manifest.read_text().splitlines()[:units]
    manifest.write_text("".join(f"{line}\n" for line in lines))
    info = read_json(target / "run.json")
    info["plan"]["units"] = units
    write_json(target / "run.json", info)
    return target
