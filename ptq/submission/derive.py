"""What a submission says in words and lists, derived from its weights' manifest, its evaluation and its runs.

`ptq package` writes what is derived here; `ptq verify` derives it again and compares the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from ptq.checkpoint.manifest import CARD_FILE, Manifest
from ptq.evaluation.runs import Run
from ptq.report.facts import Facts
from ptq.report.reproduce import RECIPE_FILE, reproduction
from ptq.store.calibration import CalibrationInfo
from ptq.store.evaluation import PASS, Evaluation
from ptq.store.run_info import RunInfo
from ptq.store.run_manifest import ManifestLine
from ptq.store.submission import FILE as SUBMISSION
from ptq.store.submission import SubmissionInfo
from ptq.submission.contents import WEIGHTS
from ptq.submission.instructions import readme, reproduce_script
from ptq.wan.card import model_card

PROMPTS, README, SCRIPT = "prompts.jsonl", "README.md", "reproduce.sh"
CARD = f"{WEIGHTS}/{CARD_FILE}"
"""The checkpoint's model card, with the verdict of this evaluation."""
_PROMPT_KEYS = ("unit", "dataset", "sample_id", "k", "prompt", "score_prompt", "seed", "latent_sha256", "image_sha256")


def derive(
    checkpoint: Path,
    manifest: Manifest,
    judged: Evaluation,
    calibration: CalibrationInfo | None,
    infos: Mapping[str, RunInfo],
    lines: Mapping[str, ManifestLine],
) -> dict[str, bytes]:
    """Name in the archive -> content.

    Args:
        checkpoint: the packed checkpoint, of `manifest`.
        calibration: of the records it was made from; None where that is not here.
        infos: role -> run.json.
        lines: unit -> line of the candidate's manifests, of the finished units.
    """
    runs = {role: Run(checkpoint, info, {}, {}) for role, info in infos.items()}
    facts = Facts(checkpoint, judged, [], checkpoint, manifest, calibration=calibration, runs=runs)
    recipe = manifest.recipe.model_dump(mode="json")
    return {
        RECIPE_FILE: yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True).encode(),
        PROMPTS: _prompts(lines),
        README: readme(manifest, judged).encode(),
        SCRIPT: reproduce_script(reproduction(facts), manifest).encode(),
        SUBMISSION: _claims(manifest, judged).as_bytes(),
        CARD: model_card(manifest, judged).encode(),
    }


def _prompts(lines: Mapping[str, ManifestLine]) -> bytes:
    """Prompts and seeds of every finished unit, one JSON line each, in unit order."""
    text = [
        json.dumps({key: getattr(lines[u], key) for key in _PROMPT_KEYS}, ensure_ascii=False) for u in sorted(lines)
    ]
    return ("\n".join(text) + "\n").encode()


def _claims(manifest: Manifest, judged: Evaluation) -> SubmissionInfo:
    return SubmissionInfo(
        schema=1,
        format=manifest.format,
        variant=manifest.variant,
        checkpoint_digest=str(judged.candidate.checkpoint_digest),
        verdict=judged.verdict,
        failing_gate_allowed=judged.verdict != PASS,
        limit=judged.limit,
        high_precision=manifest.high_precision,
        budget_scope=manifest.budget_scope,
    )
