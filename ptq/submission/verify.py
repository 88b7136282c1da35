"""`ptq verify`: does this archive hold what it claims?

One rule: nothing that is checked says how it is checked. Dimensions are those of the suite, units those of the runs,
format and blocks those of the tensors, gate and limits those of the rules; every number is computed again and compared;
texts are derived again. What nobody can check from the archive is listed as not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ptq.evaluation.suites import get_suite
from ptq.store.files import scratch_directory
from ptq.submission.check import Claim, How, decide, not_checked
from ptq.submission.contents import Contents
from ptq.submission.members import (
    check_calibration,
    check_checksums,
    check_manifest,
    check_members,
    check_source,
    check_texts,
)
from ptq.submission.origin import check_original
from ptq.submission.repeat import check_loading, check_scores, check_unit
from ptq.submission.runs import check_held_out, check_identity, check_measured_files, check_pairing, check_settings
from ptq.submission.scores import check_numbers, check_rules, check_units, check_verdict
from ptq.submission.unpack import extract_archive
from ptq.submission.weights import check_blocks, check_coverage, check_scheme

Check = Callable[[Contents], str]
FOLDER = "ptq-verify"
"""Name of the temporary folders that archives are unpacked into."""
READ: tuple[tuple[str, How, Check], ...] = (
    ("the members are those of a submission", "compared", check_members),
    ("every member has its checksum in SHA256SUMS", "recomputed", check_checksums),
    ("the checkpoint's files have the digests of its manifest", "recomputed", check_manifest),
    ("format, transform and quantized layers, from the tensors", "recomputed", check_scheme),
    ("protected blocks are within the budget, from the tensors", "recomputed", check_blocks),
    ("the W4A4 coverage, from the tensors", "recomputed", check_coverage),
    ("the calibration is the one of the manifest", "recomputed", check_calibration),
    ("recipe, prompts, README, script, model card and submission.json", "recomputed", check_texts),
    ("the source is that of the package", "compared", check_source),
    ("runs, evaluation and weights belong together", "recomputed", check_identity),
    ("both runs are whole, and only the weights differ", "recomputed", check_pairing),
    ("videos, latents and frames have the digests of the runs", "recomputed", check_measured_files),
    ("the reference run is of the original model", "compared", check_original),
    ("both runs have the model's own settings", "compared", check_settings),
    ("no evaluated prompt was a calibration prompt", "compared", check_held_out),
    ("the evaluation is by the rules", "compared", check_rules),
    ("every unit has every score, in the range of its measure", "compared", check_units),
    ("every number of evaluation.json, from the units", "recomputed", check_numbers),
    ("the verdict, by the bootstrap of the rules", "recomputed", check_verdict),
)
"""Checks that read: seconds, and bounded by the size of the archive."""
REPEAT: tuple[tuple[str, How, Check], ...] = (
    ("what the videos show, measured again", "recomputed", check_scores),
    ("the checkpoint loads", "recomputed", check_loading),
)
VBENCH = (
    "VBench's scores are those of the videos",
    "the archive has no VBench; score the videos with `ptq evaluate --vbench-python` and compare units.jsonl",
)
UNIT: tuple[str, How, Check] = ("a unit, generated again, has its bits and scores", "recomputed", check_unit)
ELSEWHERE = (
    ("the prompts are those of the challenge", "compare prompts.jsonl with the list that you know"),
    ("errors, times, versions and names in manifest and runs", "they need the original model and the records; `reproduce.sh` makes them again"),
    ("text and pictures of the report", "read the numbers in evaluation/, which are checked"),
)  # fmt: skip
"""Claims that no archive can prove, and what a reader can do."""


def verify(archive: Path, *, max_bytes: int, regenerate: bool = True) -> list[Claim]:
    """Check every claim of a submission; the costly checks only where all others hold.

    Args:
        archive: submission.tar.gz.
        max_bytes: refuse to unpack more.
        regenerate: generate one unit again (needs as much memory and time as one video).

    Raises:
        DamagedFileError: the archive cannot be unpacked safely. PtqError: the disk is too small.
    """
    with scratch_directory(FOLDER) as folder:
        root = folder / "submission"
        return check_contents(Contents(root, extract_archive(archive, root, max_bytes)), regenerate=regenerate)


def check_contents(contents: Contents, *, regenerate: bool = True) -> list[Claim]:
    """Every claim of an unpacked submission, see `verify`. Units are generated into a folder beside its members."""
    claims: list[Claim] = []
    for name, how, check in (*READ, *REPEAT, UNIT):
        costly = (name, how, check) not in READ
        if costly and any(claim.holds is False for claim in claims):
            claims.append(not_checked(name, "not tried, because of what does not hold above"))
        elif name == UNIT[0] and not regenerate:
            claims.append(not_checked(name, "--no-regenerate"))
        else:
            claims.append(_decide(contents, name, how, check, claims))
    if all(claim.holds is not False for claim in claims) and get_suite(contents.evaluation.suite).is_vbench:
        claims.append(not_checked(*VBENCH))
    return claims + [not_checked(*claim) for claim in ELSEWHERE]


def _decide(contents: Contents, name: str, how: How, check: Check, before: Sequence[Claim]) -> Claim:
    """One check, its text with names of members instead of paths; a text that was given before is pointed to."""
    claim = decide(name, how, lambda: check(contents))
    found = claim.found.replace(f"{contents.root}/", "")
    if claim.holds is False and any(found == one.found for one in before):
        found = f"the same as of: {next(one.name for one in before if found == one.found)}"
    return replace(claim, found=found)
