"""Whether the two runs of a submission are what they say: of these weights and another model, paired, whole.

Identity, seeds and the digest of a run are computed again; the files that were measured, where the archive has them, are
compared with the manifests.
"""

from __future__ import annotations

from collections.abc import Collection

from ptq import limits
from ptq.errors import DamagedFileError
from ptq.evaluation.overlap import seen_in_calibration
from ptq.evaluation.runs import pair_runs
from ptq.generation import Settings, departures
from ptq.generation.settings import LATER
from ptq.generation.units import Unit
from ptq.prompts import Sample
from ptq.store.evaluation import ROLES
from ptq.store.files import digest, sha256_file
from ptq.store.lora import describe_loras, lora_identity
from ptq.store.run_info import RunInfo
from ptq.store.run_manifest import FILE_KEYS, ManifestLine
from ptq.submission.check import NotCheckedError
from ptq.submission.contents import Contents
from ptq.submission.origin import embedded_original
from ptq.wan.layout import read_layout

_FROM_SETTINGS = {
    "width": "width",
    "height": "height",
    "frames": "num_frames",
    "fps": "fps",
    "steps": "steps",
    "flow_shift": "flow_shift",
    "guidance_scale": "guidance_scale",
    "guidance_scale_2": "guidance_scale_2",
}
"""Field of a manifest line -> the setting of run.json that it repeats."""


def check_identity(contents: Contents) -> str:
    """The candidate run is of these weights, the reference run of an unquantized model.

    Raises:
        DamagedFileError: names the two that differ.
    """
    weights, judged = contents.identity, contents.evaluation
    candidate, reference = contents.infos["candidate"], contents.infos["reference"]
    for what, value in (
        ("the evaluation", judged.candidate.checkpoint_digest),
        ("the candidate run", candidate.checkpoint.digest),
    ):
        if value != weights.digest:
            raise DamagedFileError(
                f"{what} is of a checkpoint with digest {str(value)[:12]}, the weights have {weights.digest[:12]}"
            )
    if candidate.checkpoint.format != weights.format:
        raise DamagedFileError(
            f"the candidate run is of a {candidate.checkpoint.format} checkpoint, the weights are {weights.format}"
        )
    if lora_identity(candidate.lora) != lora_identity(weights.loras):
        raise DamagedFileError(
            f"the candidate run names {describe_loras(candidate.lora) or 'no LoRA'}, the weights were quantized with {describe_loras(weights.loras) or 'none'}"
        )
    if reference.checkpoint.format is not None or reference.checkpoint.digest in (None, weights.digest):
        raise DamagedFileError("the reference run is of a quantized checkpoint; it should be of the original model")
    for role, info in contents.infos.items():
        if getattr(judged, role).run_digest != info.digest:
            raise DamagedFileError(f"the evaluation's {role} run is another one than runs/{role}")
        decisive = {
            "checkpoint_digest": info.checkpoint.digest,
            "dataset": info.dataset,
            "settings": info.settings,
            "versions": info.versions,
            **lora_identity(info.lora),
        }
        if digest(decisive) != info.digest:
            raise DamagedFileError(f"runs/{role}/run.json was changed: its digest is not that of its settings")
    return f"weights {weights.digest[:12]}, reference {str(reference.checkpoint.digest)[:12]} ({reference.model})"


def check_pairing(contents: Contents) -> str:
    """Both runs hold the same finished units, made under the same conditions, each with the seed of its name.

    Raises:
        DamagedFileError: a line that contradicts its run. PtqError: units or conditions that differ.
    """
    for role, lines in contents.lines.items():
        settings = bounded_settings(contents.infos[role])
        if contents.layout.starts_from_image(settings.image_to_video) != settings.image_to_video:
            raise DamagedFileError(f"runs/{role} started from no image, which {contents.layout.variant.name} needs")
        settings.check_samples(contents.infos[role].plan.samples_per_prompt)
        done = [line for line in lines.values() if line.is_done]
        units = units_of(done)
        for line in done:
            _check_line(role, line, units[line.unit], contents.infos[role], settings)
    runs = contents.runs
    pairs = pair_runs(runs["reference"], runs["candidate"]).pairs
    for role in ROLES:
        done = [line for line in contents.lines[role].values() if line.is_done]
        _check_noise(role, done, bounded_settings(contents.infos[role]))
        plan = contents.infos[role].plan
        if plan.units != len(pairs):
            raise DamagedFileError(f"runs/{role} was planned for {plan.units} units and has {len(pairs)}")
        beyond = [
            line.unit for line in contents.lines[role].values() if not 0 <= int(line.k or 0) < plan.samples_per_prompt
        ]
        if beyond:
            raise DamagedFileError(
                f"runs/{role} has unit {beyond[0]}, {plan.samples_per_prompt} videos a prompt were planned"
            )
        for sample in {line.unit.rsplit("/", 1)[0] for line in contents.lines[role].values()}:
            absent = [
                k
                for k in range(min(plan.samples_per_prompt, len(pairs) + 1))
                if f"{sample}/{k}" not in runs[role].units
            ]
            if absent:
                raise DamagedFileError(
                    f"runs/{role}: unit {sample}/{absent[0]} is missing, {plan.samples_per_prompt} videos a prompt were planned"
                )
    same = [
        ours.name
        for ours, theirs in pairs
        if ours.line.final_latents_sha256 in (theirs.line.final_latents_sha256,)
        and ours.line.final_latents_sha256 is not None
    ]
    same += [ours.name for ours, theirs in pairs if ours.line.video_sha256 == theirs.line.video_sha256]
    if same:
        raise DamagedFileError(
            f"both runs have the same result in {len(set(same))} of {len(pairs)} units, for example {same[0]}: quantized weights never give the original's bits, so one run stands for both"
        )
    found = f"{len(pairs)} units, seeds computed again, conditions equal"
    if bounded_settings(contents.infos["candidate"]).seed_scheme == "vbench":
        found += "; by scheme vbench, so compare the order of the prompts (seed // 100000 in prompts.jsonl) with the list that you know"
    return found


def units_of(lines: Collection[ManifestLine]) -> dict[str, Unit]:
    """Name -> unit of the finished lines of a run.

    No line says which prompt is the first: the prompts are in the order of their seeds, so that by scheme vbench they have to
    be numbered from 0 without a gap. By other schemes no seed depends on it.
    """
    first: dict[tuple[str, str], int] = {}
    for line in lines:
        key = str(line.dataset), str(line.sample_id)
        first[key] = min(first.get(key, int(line.seed or 0)), int(line.seed or 0))
    position = {key: number for number, key in enumerate(sorted(first, key=lambda key: (first[key], key)))}
    return {
        line.unit: Unit(
            Sample(str(line.dataset), str(line.sample_id), str(line.prompt), str(line.score_prompt)),
            int(line.k or 0),
            position[str(line.dataset), str(line.sample_id)],
        )
        for line in lines
    }


def bounded_settings(info: RunInfo) -> Settings:
    """Settings of a run, small enough to be followed.

    Raises:
        DamagedFileError: not the settings of this version, or beyond what is ever generated.
    """
    settings = Settings.from_json(info.settings)
    pixels = settings.width * settings.height * settings.num_frames
    if settings.steps > limits.VIDEO_STEPS or pixels > limits.VIDEO_PIXELS:
        raise DamagedFileError(
            f"run.json asks for {settings.steps} steps of {settings.width} x {settings.height} x {settings.num_frames}; at most {limits.VIDEO_STEPS} steps and {limits.VIDEO_PIXELS} pixels are followed"
        )
    return settings


def _check_line(role: str, line: ManifestLine, unit: Unit, info: RunInfo, settings: Settings) -> None:
    wanted = {
        "unit": unit.name,
        "dataset": info.dataset,
        "seed": unit.seed(settings.seed, settings.seed_scheme),
        "checkpoint_digest": info.checkpoint.digest,
        **{key: getattr(settings, name) for key, name in _FROM_SETTINGS.items()},
    }
    for key, value in wanted.items():
        if getattr(line, key) != value:
            raise DamagedFileError(
                f"runs/{role}: unit {line.unit} says {key} = {getattr(line, key)!r}, its run and name give {value!r}"
            )

    if (line.image_sha256 is not None) != settings.image_to_video:
        raise DamagedFileError(
            f"runs/{role}: unit {line.unit} started from {'no ' if settings.image_to_video else 'an '}image, its run says otherwise"
        )


def _check_noise(role: str, lines: list[ManifestLine], settings: Settings) -> None:
    """Every unit has files of its own, and final latents that no other has; the noise that it starts from too, where the run's
    settings do not say that all have one."""
    seen: dict[str, str] = {}
    noise = settings.fixed_latent or (lines[0].latent_sha256 if lines else None)
    for line in lines:
        if settings.one_noise and line.latent_sha256 != noise:
            raise DamagedFileError(
                f"runs/{role}: unit {line.unit} does not start from the noise that all units should have"
            )
        own = [getattr(line, key) for key in FILE_KEYS] + [line.final_latents_sha256]
        own += [] if settings.one_noise else [line.latent_sha256]
        for value in filter(None, own):
            if value in seen:
                raise DamagedFileError(
                    f"runs/{role}: units {seen[value]} and {line.unit} are one result, by its name or its digest ({value[:80]})"
                )
            seen[value] = line.unit


def check_held_out(contents: Contents) -> str:
    """No evaluated prompt is one that the records were made from, by the captions' digests.

    Raises:
        DamagedFileError: names a unit. NotCheckedError: the manifest names no calibration.
    """
    lines = {name: line for name, line in contents.lines["candidate"].items() if line.is_done}
    seen = seen_in_calibration(contents.manifest, lines)
    if seen is None:
        raise NotCheckedError("the manifest names no calibration")
    if seen:
        raise DamagedFileError(
            f"{len(seen)} of {len(lines)} units are of prompts that the weights were calibrated with, for example {seen[0]}"
        )
    if contents.evaluation.overlap:
        raise DamagedFileError(
            f"evaluation.json says that {contents.evaluation.overlap} prompts were seen in calibration"
        )
    return f"{len(lines)} units compared by caption"


def check_settings(contents: Contents) -> str:
    """The runs were made with the settings that the model has by default.

    Raises:
        NotCheckedError: with others, which the archive cannot judge; names them.
    """
    original = embedded_original(contents)
    layout = contents.layout if original is None else read_layout(original[0])
    own = {**layout.preset.sampling(), **LATER, "attention_backend": None}
    found = departures(bounded_settings(contents.infos["candidate"]), own, "the model's own")
    if found:
        raise NotCheckedError(f"both runs have {', '.join(found)}; judge whether the loss may be measured so")
    return ", ".join(layout.preset.sampling())


def check_measured_files(contents: Contents) -> str:
    """Videos, latents and frames have the digests of the manifests.

    Raises:
        DamagedFileError: names the first that differs. NotCheckedError: they are not in the archive.
    """
    if not contents.has_measured_files:
        raise NotCheckedError(
            "the videos are not in the archive; ask for them, and compare them with the sha256 in runs/*/manifest-*.jsonl"
        )
    files = contents.measured_files()
    for name, value in files.items():
        if sha256_file(contents.root / name) != value:
            raise DamagedFileError(f"{name} is not the file of its manifest line: its sha256 differs")
    return f"{len(files)} files"
