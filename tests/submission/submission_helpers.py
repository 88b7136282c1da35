"""What tests of packages share beside fixtures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ptq.checkpoint.manifest import MANIFEST_FILE
from ptq.store.files import digest, read_json, write_json
from ptq.submission.check import Claim

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
