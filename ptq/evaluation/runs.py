"""Read generation directories and pair them unit by unit; refuse whatever would make a comparison unfair.

Two runs are paired when they hold the same units, and each unit started from the same noise (seed and the sha256 of the
initial latent) with the same prompt, image, size and sampler settings. Only the weights may differ. Nothing here
decodes a video; files are checked by existence and by the digests of the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptq.errors import DamagedFileError, PtqError
from ptq.store.files import read_json, read_jsonl, sha256_file

#: Manifest keys that must be equal in both runs for a unit to be a pair, with the words of the message.
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
#: Settings of run.json that are no part of a manifest line and must be equal too.
PAIRED_SETTINGS = ("negative_prompt", "max_sequence_length")
_DONE_KEYS = (
    *("sample_id", "k", "prompt", "score_prompt", "seed", "latent_sha256"),
    *("width", "height", "frames", "video", "video_sha256"),
)
_SHOWN = 3


@dataclass(frozen=True)
class Unit:
    """One finished video: `name` is dataset/sample_id/k, `record` its manifest line, `directory` the run's."""

    name: str
    record: Mapping[str, Any]
    directory: Path

    @property
    def video(self) -> Path:
        return self.directory / str(self.record["video"])

    @property
    def cluster(self) -> str:
        """The prompt's identity: the unit without k. Bootstrap resamples these."""
        return self.name.rsplit("/", 1)[0]

    @property
    def score_prompt(self) -> str:
        return str(self.record["score_prompt"])

    def optional_file(self, key: str) -> Path | None:
        """Path of an optional artifact (`final_latents`, `saved_frames`); None when the run did not keep it.

        Raises:
            DamagedFileError: the manifest names the file but it is gone.
        """
        value = self.record.get(key)
        if not value:
            return None
        path = self.directory / str(value)
        if not path.is_file():
            raise DamagedFileError(
                f"{path} is named by the manifest of {self.directory} ({key} of unit {self.name}) but does not exist. Run `ptq generate` again into that directory to make it."
            )
        return path


@dataclass(frozen=True)
class Run:
    """A generation directory: `units` are finished and on disk; `unusable` maps the others to the reason."""

    directory: Path
    info: Mapping[str, Any]
    units: Mapping[str, Unit]
    unusable: Mapping[str, str]

    def checkpoint_info(self) -> Mapping[str, Any]:
        """The run's checkpoint entry ({} for an unquantized model)."""
        value = self.info.get("checkpoint")
        return value if isinstance(value, Mapping) else {}

    def not_started(self) -> int:
        """How many planned units have no manifest line: the run was stopped before it reached them."""
        plan = self.info.get("plan") or {}
        return max(0, int(plan.get("units", 0)) - len(self.units) - len(self.unusable))

    def format(self) -> str | None:
        """Number format of the checkpoint that made the run, or None for an unquantized model."""
        value = self.checkpoint_info().get("format") or self.info.get("format")
        return None if value is None else str(value)

    def checkpoint_digest(self) -> str | None:
        """Digest of the checkpoint, from run.json or, where all units agree, from the manifest."""
        value = self.checkpoint_info().get("digest") or self.info.get("checkpoint_digest")
        if value:
            return str(value)
        digests = {unit.record.get("checkpoint_digest") for unit in self.units.values()}
        return str(next(iter(digests))) if len(digests) == 1 and None not in digests else None

    def describe(self) -> dict[str, Any]:
        """What evaluation.json keeps of the run."""
        return {
            "directory": str(self.directory),
            "run_digest": self.info.get("digest"),
            "checkpoint_digest": self.checkpoint_digest(),
            "format": self.format(),
            "model": self.info.get("model"),
            "settings": self.info.get("settings"),
            "versions": self.info.get("versions"),
        }


@dataclass(frozen=True)
class Pairing:
    """Units present in both runs, sorted by name, and `excluded`: the others with the reason."""

    pairs: list[tuple[Unit, Unit]]
    excluded: dict[str, str] = field(default_factory=dict)


def read_run(directory: str | Path) -> Run:
    """Read `run.json` and every `manifest-*.jsonl` of a generation directory.

    The last line of a unit wins within one manifest; over several shards a finished line wins over a failed one.

    Raises:
        PtqError: not a generation directory, or it has no finished unit.
        DamagedFileError: a manifest line lacks a required key or names a file outside the directory.
    """
    directory = Path(directory)
    if not (directory / "run.json").is_file():
        raise PtqError(
            f"{directory} is not a generation directory: it has no run.json. Give the --out directory of `ptq generate`."
        )
    info = read_json(directory / "run.json")
    if not isinstance(info, dict):
        raise DamagedFileError(f"{directory / 'run.json'} does not hold a JSON object.")
    lines: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(directory.glob("manifest-*.jsonl"), key=lambda p: (p.stat().st_mtime, p.name)):
        latest: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(read_jsonl(path), 1):
            if not isinstance(line.get("unit"), str):
                raise DamagedFileError(f"{path}, record {number} has no `unit`.")
            latest[line["unit"]] = line
        for name, line in latest.items():
            if name not in lines or line.get("status") == "done" or lines[name][1].get("status") != "done":
                lines[name] = (path, line)
    units, unusable = {}, {}
    for name, (path, line) in lines.items():
        if line.get("status") != "done":
            unusable[name] = f"failed: {line.get('error') or 'no reason recorded'}"
            continue
        unit = _finished_unit(directory, path, name, line)
        if unit.video.is_file():
            units[name] = unit
        else:
            unusable[name] = f"its video {unit.record['video']} is missing"
    if not units:
        raise PtqError(
            f"{directory} has no finished unit ({len(unusable)} failed or missing). Finish `ptq generate` there first."
        )
    return Run(directory, info, units, unusable)


def _finished_unit(directory: Path, manifest: Path, name: str, line: dict[str, Any]) -> Unit:
    missing = [key for key in _DONE_KEYS if line.get(key) is None]
    if missing:
        raise DamagedFileError(f"{manifest}: the finished unit {name} has no {', '.join(missing)}.")
    for key in ("video", "final_latents", "saved_frames"):
        value = line.get(key)
        if value and not (directory / str(value)).resolve().is_relative_to(directory.resolve()):
            raise DamagedFileError(f"{manifest}: {key} of unit {name} points outside the run directory ({value}).")
    return Unit(name, line, directory)


def pair_runs(reference: Run, candidate: Run, *, allow_missing: bool = False) -> Pairing:
    """Pair two runs unit by unit.

    Args:
        allow_missing: evaluate the units that both runs have, and list the others, instead of refusing.

    Raises:
        PtqError: units are missing or failed (without `allow_missing`), or a common unit was made under different
            conditions (never allowed).
    """
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
    ours, theirs = (run.info.get("settings") or {} for run in (reference, candidate))
    for key in PAIRED_SETTINGS:
        if ours.get(key) != theirs.get(key):
            raise PtqError(
                f"The runs are not paired: {key} is {ours.get(key)!r} in {reference.directory} and {theirs.get(key)!r} in {candidate.directory}. Only the weights may differ: generate both runs with the same settings."
            )
    _refuse_other_conditions(reference, candidate, common)
    return Pairing([(reference.units[name], candidate.units[name]) for name in common], excluded)


def _refuse_other_conditions(reference: Run, candidate: Run, common: list[str]) -> None:
    differing: dict[str, list[str]] = {}
    for name in common:
        ours, theirs = reference.units[name].record, candidate.units[name].record
        for key in PAIRED_KEYS:
            if ours.get(key) != theirs.get(key):
                differing.setdefault(key, []).append(name)
    if differing:
        key, names = next(iter(differing.items()))
        example = f"{reference.units[names[0]].record.get(key)!r} and {candidate.units[names[0]].record.get(key)!r}"
        raise PtqError(
            f"The runs are not paired: {', '.join(PAIRED_KEYS[k] for k in differing)} differ. For {key} that is {len(names)} of {len(common)} units, for example {names[0]} with {example}. Only the weights may differ: generate both runs with the same prompts, seed and settings."
        )


def verify_video(unit: Unit) -> None:
    """Compare a video's bytes with the manifest.

    Raises:
        DamagedFileError: the file was changed after it was generated.
    """
    if sha256_file(unit.video) != unit.record["video_sha256"]:
        raise DamagedFileError(
            f"{unit.video} is not the video that `ptq generate` wrote for unit {unit.name}: its sha256 differs from the manifest. Restore it, or delete it and run `ptq generate` again into that directory."
        )


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
