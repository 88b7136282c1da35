"""What tests of packages share beside fixtures."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.checkpoint.manifest import MANIFEST_FILE
from ptq.store.files import digest, read_json, write_bytes, write_json
from ptq.submission.check import Claim
from ptq.submission.contents import CHECKSUMS, Contents
from ptq.submission.verify import check_contents

EVALUATION, UNITS = "evaluation/evaluation.json", "evaluation/units.jsonl"
MANIFEST = f"weights/{MANIFEST_FILE}"
LINES = "manifest-0of1.jsonl"
RULES = "the evaluation is by the rules"
SCORES = "every unit has every score, in the range of its measure"
NUMBERS = "every number of evaluation.json, from the units"
VERDICT = "the verdict, by the bootstrap of the rules"
TEXTS = "recipe, prompts, README, script, model card and submission.json"
TOGETHER = "runs, evaluation and weights belong together"
PAIRED = "both runs are whole, and only the weights differ"
SHOWN = "what the videos show, measured again"
UNIT = "a unit, generated again, has its bits and scores"


@dataclass(frozen=True)
class Job:
    """Directories of the stages."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "hif4"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    def run(self, role: str) -> Path:
        return self.root / role


class Tampered:
    """A copy of the honest submission that a test changes; large files are links, so they are replaced, not edited."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> Any:
        return read_json(self.root / name)

    def edit(self, name: str, change: Callable[[Any], object]) -> None:
        """Change a JSON file in place."""
        value = self.read(name)
        change(value)
        (self.root / name).unlink()
        (self.root / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def edit_lines(self, name: str, change: Callable[[list[Any]], object]) -> None:
        """Change the list of values of a JSONL file in place."""
        values = [json.loads(line) for line in (self.root / name).read_text().splitlines()]
        change(values)
        self.write(name, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode())

    def write(self, name: str, data: bytes) -> None:
        """Replace a file; units.jsonl with the digest that evaluation.json has of it, as a forger would."""
        write_bytes(self.root / name, data)
        if name == "evaluation/units.jsonl":
            digest = hashlib.sha256(data).hexdigest()
            self.edit("evaluation/evaluation.json", lambda judged: judged.update(units_sha256=digest))

    def redo_manifest(self) -> None:
        """Digests of the checkpoint's files, as a forger would write them."""
        from ptq.checkpoint.manifest import MANIFEST_FILE, hash_files

        weights = self.root / "weights"
        manifest = read_json(weights / MANIFEST_FILE)
        manifest["files"] = hash_files(weights)
        write_json(weights / MANIFEST_FILE, manifest)

    def redo_derived(self) -> None:
        """Recipe, prompts, README, script and claims, derived from what the files say now."""
        from ptq.submission.derive import derive

        contents = self.contents()
        lines = {name: line for name, line in contents.lines["candidate"].items() if line.is_done}
        parts = (contents.manifest, contents.evaluation, contents.calibration, contents.infos, lines)
        for name, data in derive(contents.weights, *parts).items():
            self.write(name, data)

    def redo_evaluation(self, **judgement: Any) -> None:
        """evaluation.json from the units that are there now, over the dimensions that it names."""
        from ptq.evaluation import statistics
        from ptq.evaluation.scores import scores_from_units
        from ptq.store.evaluation import FILE, read_evaluation
        from ptq.store.evaluation_units import read_units

        directory = self.root / "evaluation"
        judged = read_evaluation(directory)
        lines = read_units(directory)
        scores = scores_from_units(lines, judged.dimensions)
        again = scores.compare(scores.reference, resamples=1000, seed=judged.bootstrap.seed)
        verdict = statistics.verdict(again.aggregates["mean_signed"], judged.limit or 0)
        parts = {
            "dimensions": again.dimensions,
            "aggregates": again.aggregates,
            "verdict": verdict,
            "units": len(lines),
        }
        write_json(directory / FILE, judged.model_copy(update={**parts, **judgement}).as_json())

    def redo_checksums(self) -> None:
        names = [name for name in self.names() if name != CHECKSUMS]
        lines = [f"{hashlib.sha256((self.root / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        self.write(CHECKSUMS, "".join(lines).encode())

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def contents(self) -> Contents:
        return Contents(self.root, self.names())

    def problems(self, *, regenerate: bool = False) -> dict[str, str]:
        """Claims that do not hold -> why, after the checksums were made to fit."""
        self.redo_checksums()
        claims = check_contents(self.contents(), regenerate=regenerate)
        return {claim.name: claim.found for claim in claims if claim.holds is False}


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


def by_name(claims: list[Claim]) -> dict[str, Claim]:
    return {claim.name: claim for claim in claims}


def redo_all(tampered) -> None:
    """evaluation.json exactly as `ptq evaluate` would write it from these units, and what is derived from it."""
    from ptq.submission.scores import _compute

    judged = tampered.contents().evaluation
    again = _compute(tampered.contents(), judged.bootstrap.resamples, judged.bootstrap.seed)
    tampered.edit(EVALUATION, lambda value: value.update(again.as_json()))
    tampered.redo_derived()


def redo_crc(tampered, file: Path) -> None:
    from ptq.checkpoint.safetensors_file import tensor_crc32
    from ptq.checkpoint.shards import INDEX_NAME, ShardSet

    shards = ShardSet(file.parent)
    name = (file.parent / INDEX_NAME).relative_to(tampered.root).as_posix()
    fresh = {key: tensor_crc32(shards.read(key)) for key in shards.entries}
    tampered.edit(name, lambda index: index["metadata"].update({"ptq_crc32": fresh}))


def relabel(tampered, role: str, checkpoint: str, **info: Any) -> None:
    """Give a run another checkpoint's digest, everywhere."""

    def run(value: dict[str, Any]) -> None:
        value["checkpoint"]["digest"] = checkpoint
        value["checkpoint"].update(info)
        decisive = {"checkpoint_digest": checkpoint, **{key: value[key] for key in ("dataset", "settings", "versions")}}
        value["digest"] = digest(decisive)

    tampered.edit(f"runs/{role}/run.json", run)
    tampered.edit_lines(f"runs/{role}/{LINES}", lambda lines: [x.update(checkpoint_digest=checkpoint) for x in lines])
