"""Whether the weights were calibrated with prompts that they are judged on: their loss on those is no measure.

Asked when runs are evaluated, reported, packed and verified; prompts are compared by caption (`caption_digest`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ptq import ui
from ptq.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from ptq.errors import PtqError
from ptq.evaluation.runs import Run
from ptq.prompts import caption_digest
from ptq.store.run_manifest import ManifestLine
from ptq.wan.identity import identify_model


def seen_in_calibration(manifest: Manifest, lines: Mapping[str, ManifestLine]) -> list[str] | None:
    """Units of prompts that the weights were calibrated with, compared by caption; None where the manifest has no calibration."""
    if manifest.calibration is None:
        return None
    known = {sample["caption_digest"] for sample in manifest.calibration["samples"]}
    return sorted(name for name, line in lines.items() if caption_digest(str(line.prompt)) in known)


def find_weights(digest: str | None, guesses: Iterable[Path]) -> Path | None:
    """The first of these directories that is the packed checkpoint with this digest."""
    return next(
        (
            path
            for path in guesses
            if (path / MANIFEST_FILE).is_file() and identify_model(str(path), path).digest == digest
        ),
        None,
    )


def check_overlap(candidate: Run, units: Iterable[str], *, allow: bool) -> tuple[int | None, list[str]]:
    """Compare the evaluated prompts with those of the checkpoint's records, where the checkpoint lies where the run says.

    Args:
        units: names of the units that are compared. allow: say how many are in both, instead of refusing.

    Returns:
        How many prompts are in both (None: not known), and what a report says first.

    Raises:
        PtqError: prompts are in both. DamagedFileError: the checkpoint's manifest cannot be read.
    """
    info, lines = candidate.info, {name: candidate.units[name].line for name in units}
    found = find_weights(info.checkpoint.digest, [Path(info.model)] if info.model else [])
    seen = seen_in_calibration(read_manifest(found), lines) if found else None
    if not seen:
        return None if seen is None else 0, []
    prompts, both = ({caption_digest(str(lines[name].prompt)) for name in names} for names in (lines, seen))
    said = f"{len(both)} of {len(prompts)} evaluated prompts are among those that {found} was calibrated with"
    if not allow:
        raise PtqError(
            f"{said}, for example {ui.shorten(str(lines[seen[0]].prompt))!r} ({seen[0]}). A loss on prompts that the weights have seen is no measure of others: evaluate other prompts (`ptq generate --exclude` leaves out those of a file), calibrate with others, or pass --allow-overlap; the report then says so first."
        )
    return len(both), [f"{said}, which --allow-overlap let pass: the evaluation is not held out."]
