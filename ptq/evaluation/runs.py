"""Read generation directories and pair them unit by unit; refuse whatever would make a comparison unfair.

Two runs are paired when they hold the same units, and each unit started from the same noise (seed and the sha256 of the
initial latent) with the same prompt, image, size and sampler settings. Only the weights may differ. Nothing here
decodes a video. Whatever is measured is opened through `Unit.open`, which compares its bytes with the digest that the manifest
recorded when the file was made: a file is never believed by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.store.evaluation import RunSide
from ptq.store.lora import describe_loras, lora_identity
from ptq.store.run_info import RunInfo, read_run_info
from ptq.store.run_manifest import FILE_KEYS, ManifestLine, read_lines
from ptq.wan.attention import rounds_more

PAIRED_KEYS: Mapping[str, str] = {
    "seed": "the seed",
    "latent_sha256": "the initial noise",
    "prompt": "the prompt",
    "score_prompt": "the scored prompt",
    "image_sha256": "the input image",
    "width": "the width",
    "height": "the height",
    "frames": "the number of frames",
    "fps": "the frame rate",
    "steps": "the number of steps",
    "flow_shift": "the flow shift",
    "guidance_scale": "the guidance scale",
    "guidance_scale_2": "the guidance scale of the second expert",
}
"""Fields of a manifest line that must be equal in both runs for a unit to be a pair, with the words of the message."""
PAIRED_SETTINGS = ("negative_prompt", "max_sequence_length")
"""Settings of run.json that are no part of a manifest line and must be equal too."""
NAMED_DIFFERENCES = ("cache", "attention-backend")
"""Options of `ptq generate` that may differ only where they are named: they change videos by themselves."""
_SHOWN = 3


@dataclass(frozen=True)
class Unit:
    """One finished video: its manifest line, and the directory of its run."""

    line: ManifestLine
    directory: Path

    @property
    def name(self) -> str:
        """dataset/sample_id/k."""
        return self.line.unit

    @property
    def video(self) -> Path:
        return self.directory / str(self.line.video)

    @property
    def cluster(self) -> str:
        """The prompt's identity: the unit without k. Bootstrap resamples these."""
        return self.name.rsplit("/", 1)[0]

    @property
    def score_prompt(self) -> str:
        return str(self.line.score_prompt)

    def keeps(self, key: str) -> bool:
        """Whether the run kept a file (of `FILE_KEYS`) that can be measured: one with a digest."""
        return bool(getattr(self.line, key) and getattr(self.line, f"{key}_sha256"))

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """A file of the unit (one of `FILE_KEYS`), opened at its start after its bytes were compared with the manifest's digest.

        Raises:
            DamagedFileError: the file is gone, or was changed after it was generated.
        """
        path = self.directory / str(getattr(self.line, key))
        if not path.is_file():
            raise DamagedFileError(
                f"{path} is named by the manifest of {self.directory} ({key} of unit {self.name}) but does not exist. Run `ptq generate` again into that directory to make it."
            )
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != getattr(self.line, f"{key}_sha256"):
                raise DamagedFileError(
                    f"{path} is not the file that `ptq generate` wrote for unit {self.name}: its sha256 differs from the manifest's ({key}). Restore it, or run `ptq generate` again into that directory, which makes it anew."
                )
            file.seek(0)
            yield file

    def check(self, *keys: str) -> None:
        """Compare the files that the run kept of these kinds with their digests; errors as `open`."""
        for key in keys:
            if self.keeps(key):
                with self.open(key):
                    pass


@dataclass(frozen=True)
class Run:
    """A generation directory: `units` are finished and on disk; `unusable` maps the others to the reason."""

    directory: Path
    info: RunInfo
    units: Mapping[str, Unit]
    unusable: Mapping[str, str]

    def not_started(self) -> int:
        """How many planned units have no manifest line: the run was stopped before it reached them."""
        return max(0, self.info.plan.units - len(self.units) - len(self.unusable))

    def without_digest(self) -> dict[str, int]:
        """Kind of file -> how many units keep one without a digest: runs of earlier versions. Such files are not measured."""
        lines = [unit.line for unit in self.units.values()]
        counts = {
            key: sum(bool(getattr(line, key) and not getattr(line, f"{key}_sha256")) for line in lines)
            for key in FILE_KEYS
        }
        return {key: count for key, count in counts.items() if count}

    def describe(self) -> RunSide:
        """What evaluation.json keeps of the run."""
        return RunSide(
            directory=str(self.directory),
            run_digest=self.info.digest,
            checkpoint_digest=self.info.checkpoint.digest,
            format=self.info.checkpoint.format,
            model=self.info.model,
            settings=dict(self.info.settings),
            versions=self.info.versions,
            lora=self.info.lora,
        )


@dataclass(frozen=True)
class Pairing:
    """Units present in both runs, sorted by name, and `excluded`: the others with the reason."""

    pairs: list[tuple[Unit, Unit]]
    excluded: dict[str, str] = field(default_factory=dict)


def read_run(directory: str | Path) -> Run:
    """Read `run.json` and the manifests of a generation directory.

    Raises:
        PtqError: not a generation directory, or it has no finished unit.
        DamagedFileError: run.json or a manifest line is damaged, or names a file outside the directory.
    """
    directory = Path(directory)
    info = read_run_info(directory)
    units, unusable = {}, {}
    for name, line in read_lines(directory).items():
        unit = Unit(line, directory)
        if not line.is_done:
            unusable[name] = f"failed: {line.error or 'no reason recorded'}"
        elif unit.video.is_file():
            units[name] = unit
        else:
            unusable[name] = f"its video {line.video} is missing"
    if not units:
        raise PtqError(
            f"{directory} has no finished unit ({len(unusable)} failed or missing). Finish `ptq generate` there first."
        )
    return Run(directory, info, units, unusable)


def check_differences(names: Collection[str]) -> None:
    """Raise UsageError where one is no name of `NAMED_DIFFERENCES`."""
    for name in names:
        if name not in NAMED_DIFFERENCES:
            raise UsageError(
                f"--allow-difference takes {', '.join(NAMED_DIFFERENCES)}, found {name!r}. Whatever else decides the videos must be equal in both runs."
            )


def named_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Which of `NAMED_DIFFERENCES` two runs' settings have: name -> both values. An attention counts where one of the two
    multiplies in 8 bits; others differ in their last bits only."""
    values = {name: [settings.get(name.replace("-", "_")) for settings in (ours, theirs)] for name in NAMED_DIFFERENCES}
    found = {name: (one, other) for name, (one, other) in values.items() if one != other}
    if not any(map(rounds_more, values["attention-backend"])):
        found.pop("attention-backend", None)
    return found


def pair_runs(
    reference: Run, candidate: Run, *, allow_missing: bool = False, allow_differences: Collection[str] = ()
) -> Pairing:
    """Pair two runs unit by unit.

    Args:
        allow_missing: evaluate the units that both runs have, and list the others, instead of refusing.
        allow_differences: settings of `NAMED_DIFFERENCES` that may differ.

    Raises:
        UsageError: no such setting. PtqError: units are missing or failed (without `allow_missing`), or a common unit was made under different
            conditions (never allowed).
    """
    check_differences(allow_differences)
    excluded: dict[str, str] = {}
    for role, run, other in (("reference", reference, candidate), ("candidate", candidate, reference)):
        for name in sorted({*other.units, *run.unusable} - set(run.units)):
            reason = f"{role}: {run.unusable.get(name, 'not in the run')}"
            excluded[name] = f"{excluded[name]}; {reason}" if name in excluded else reason
        if run.not_started():
            excluded[f"{run.not_started()} units of the {role}"] = "planned, but never started"
    common = sorted(set(reference.units) & set(candidate.units))
    if excluded and not allow_missing:
        raise PtqError(
            f"The two runs do not hold the same finished units: {_some([f'{n} ({r})' for n, r in excluded.items()])}. {len(common)} units are in both. Finish the runs with `ptq generate`, or pass --allow-missing to evaluate only the units that both have."
        )
    if not common:
        raise PtqError(
            f"{reference.directory} and {candidate.directory} have no unit in common: they were made from different prompts."
        )
    merged = [lora_identity(run.info.lora) for run in (reference, candidate)]
    if merged[0] != merged[1]:
        found = [describe_loras(run.info.lora) or "none" for run in (reference, candidate)]
        raise PtqError(
            f"The runs are not paired: merged LoRAs differ: {found[0]} in {reference.directory}, {found[1]} in {candidate.directory}. A checkpoint is compared with the model that it was quantized from: generate the reference with the same --lora and --lora-2 as `ptq calibrate` had."
        )
    ours, theirs = reference.info.settings, candidate.info.settings
    for key in PAIRED_SETTINGS:
        if ours.get(key) != theirs.get(key):
            raise PtqError(
                f"The runs are not paired: {key} is {ours.get(key)!r} in {reference.directory} and {theirs.get(key)!r} in {candidate.directory}. Only the weights may differ: generate both runs with the same settings."
            )
    for name, (one, other) in named_differences(ours, theirs).items():
        if name not in allow_differences:
            raise PtqError(
                f"The runs are not paired: {name} is {one!r} in {reference.directory} and {other!r} in {candidate.directory}, and the loss would be of this and of the weights together. Generate both runs with the same --{name}, or pass --allow-difference {name} to compare them all the same; the report then says so first."
            )
    _refuse_other_conditions(reference, candidate, common)
    return Pairing([(reference.units[name], candidate.units[name]) for name in common], excluded)


def _refuse_other_conditions(reference: Run, candidate: Run, common: list[str]) -> None:
    differing: dict[str, list[str]] = {}
    for name in common:
        ours, theirs = reference.units[name].line, candidate.units[name].line
        for key in PAIRED_KEYS:
            if getattr(ours, key) != getattr(theirs, key):
                differing.setdefault(key, []).append(name)
    if differing:
        key, names = next(iter(differing.items()))
        values = [getattr(run.units[names[0]].line, key) for run in (reference, candidate)]
        example = f"{values[0]!r} and {values[1]!r}"
        raise PtqError(
            f"The runs are not paired: {', '.join(PAIRED_KEYS[k] for k in differing)} differ. For {key} that is {len(names)} of {len(common)} units, for example {names[0]} with {example}. Only the weights may differ: generate both runs with the same prompts, seed and settings."
        )


def verify_video(unit: Unit) -> None:
    """Compare a video's bytes with the manifest.

    Raises:
        DamagedFileError: the file was changed after it was generated.
    """
    unit.check("video")


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
