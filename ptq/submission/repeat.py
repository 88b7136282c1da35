"""Doing a part of the work again: units drawn at random are generated from the weights and measured, and compared.

Which units is drawn by the machine that verifies, and not from anything in the archive: whoever made it cannot know which
ones have to be honest.
"""

from __future__ import annotations

import math
import random
from importlib.metadata import version
from pathlib import Path

from ptq import limits
from ptq.errors import DamagedFileError
from ptq.evaluation.pairs import film_psnr, measure_unit
from ptq.evaluation.runs import Run, Unit, read_run
from ptq.evaluation.suites import FIRST_FRAME, get_suite
from ptq.generation import run_generation
from ptq.store.evaluation import ROLES
from ptq.store.evaluation_units import UnitLine
from ptq.store.run_manifest import ManifestLine
from ptq.store.sharding import Shard
from ptq.submission.check import NotCheckedError
from ptq.submission.contents import Contents
from ptq.submission.origin import embedded_original
from ptq.submission.runs import bounded_settings, units_of
from ptq.wan.attention import SLOTS, obstacle
from ptq.wan.identity import ModelIdentity
from ptq.wan.loading import load_pipeline

TOLERANCE = 1e-6
"""Relative, of a measure on the same pixels with another version of a library."""
FILM_PSNR = 28.0
"""dB that a video has at least against the frames it was made of: pictures have 45, noise 29 to 36; the same noise in another order 20."""
_BITS = ("latent_sha256", "final_latents_sha256", "saved_frames_sha256", "video_sha256")
_draw = random.SystemRandom()


def check_scores(contents: Contents) -> str:
    """Measure pairs of videos of the archive again, all of them up to a limit of pixels, and compare all values.

    Raises:
        DamagedFileError: names unit, measure and both values. NotCheckedError: the videos are not in the archive.
    """
    if not contents.has_measured_files:
        raise NotCheckedError("that the scores were measured on the videos: they are not in the archive")
    runs = {role: read_run(contents.run_directory(role)) for role in ROLES}
    lines = {line.unit: line for line in contents.units}
    names, pixels = _draw.sample(sorted(lines), len(lines)), 0
    checked = 0
    for name in names:
        line = runs["candidate"].units[name].line
        pixels += int(line.width or 0) * int(line.height or 0) * int(line.frames or 0)
        if checked and pixels > limits.MEASURED_PIXELS:
            break
        for role, run in runs.items():
            psnr = film_psnr(run.units[name])
            if psnr is not None and psnr < FILM_PSNR:
                raise DamagedFileError(
                    f"unit {name} of the {role}: video and saved frames show different pictures ({psnr:.1f} dB)"
                )
        _compare(contents, runs, lines[name])
        checked += 1
    left = "" if checked == len(names) else ", drawn at random"
    return f"{checked} of {len(names)} units{left}"


def _compare(contents: Contents, runs: dict[str, Run], line: UnitLine) -> None:
    """Measure one unit of both runs, or of the candidate alone, whose files are here, and compare what `units.jsonl` says."""
    judged = contents.evaluation
    pair: list[Unit] = [runs.get(role, runs["candidate"]).units[line.unit] for role in ROLES]
    suite = get_suite(judged.suite)
    again = measure_unit(pair[0], pair[1], suite, judged.stride or 1, "")
    for table, recorded, measured in (
        ("reference", line.reference, again.reference),
        ("candidate", line.candidate, again.candidate),
        ("paired", line.paired, again.paired),
    ):
        if not {"paired": len(runs) == len(ROLES)}.get(table, table in runs):
            continue
        elsewhere = {*FIRST_FRAME, *(suite.scored if suite.is_vbench else ())} - set(measured)
        for name in {**recorded, **measured}.keys() - elsewhere:
            if not _equal(recorded.get(name), measured.get(name)):
                raise DamagedFileError(
                    f"unit {line.unit}, {table}: units.jsonl says {name} = {recorded.get(name)}, its videos give {measured.get(name)}"
                )
    if (
        any(getattr(line.hashes, role, None) != getattr(again.hashes, role) for role in runs)
        or line.source != again.source
    ):
        raise DamagedFileError(f"unit {line.unit}: units.jsonl is of other frames than its videos show")


def _equal(recorded: float | None, measured: float | None) -> bool:
    if recorded is None or measured is None:
        return recorded is measured
    return math.isclose(recorded, measured, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def check_loading(contents: Contents) -> str:
    """Load the checkpoint.

    Raises:
        PtqError: what does not fit.
    """
    pipeline = load_pipeline(contents.weights)
    return f"{type(pipeline).__name__} of {contents.manifest.variant}"


def check_unit(contents: Contents) -> str:
    """Generate a unit of the candidate again, of the reference too where that is an embedded model; compare latents and
    video with the manifest, and with both at hand the scores.

    Raises:
        DamagedFileError: other bytes or scores; says whether machine and versions are the recorded ones.
        NotCheckedError: every unit starts from an image, which the archive does not hold.
    """
    own = contents.lines["candidate"]
    free = sorted(name for name, line in own.items() if line.is_done and not line.image_sha256)
    if not free:
        raise NotCheckedError("every unit starts from an image, and the images are not in the archive")
    device = _device(contents)
    if contents.infos["candidate"].settings.get("fixed_latent") is not None:
        raise NotCheckedError("every unit starts from one latent, and its file is not in the archive")
    name = _draw.choice(free)
    models = {"candidate": (contents.weights, contents.identity)}
    original = embedded_original(contents)
    if original is not None:
        models["reference"] = original
    runs = {role: _generate(contents, role, name, device, *model) for role, model in models.items()}
    found = f"{name} of the candidate, drawn from {len(free)}"
    _compare(contents, runs, next(line for line in contents.units if line.unit == name))
    if original is None:
        return f"{found}; the original model is not in the archive, so its videos are not checked"
    return f"{found}, and of the original model; both measured again"


def _device(contents: Contents) -> str:
    """Where the unit is generated: on the kind of device that it was recorded on.

    Raises:
        NotCheckedError: there is none here, or several are needed together.
    """
    import torch

    if bounded_settings(contents.infos["candidate"]).context_parallel > 1:
        raise NotCheckedError(
            "several processes made each video together; run `ptq generate` on as many and compare the digests"
        )
    devices = sorted({str(line.device) for lines in contents.lines.values() for line in lines.values()})
    if all(device.startswith("cpu") for device in devices):
        return "cpu"
    if not torch.cuda.is_available():
        raise NotCheckedError(
            f"recorded on {', '.join(devices)}, and here is no GPU; bits are equal on the same hardware only"
        )
    for settings in map(bounded_settings, contents.infos.values()):
        problem = obstacle("cuda") if settings.attention_backend in SLOTS else None
        if problem:
            raise NotCheckedError(f"made with --attention-backend {settings.attention_backend}, which {problem}")
    return "cuda"


def _generate(contents: Contents, role: str, name: str, device: str, directory: Path, model: ModelIdentity) -> Run:
    """One unit in a directory of its own, with the bits of its manifest line.

    Raises:
        DamagedFileError: other bits.
    """
    info, line = contents.infos[role], contents.lines[role][name]
    units = units_of([line for line in contents.lines[role].values() if line.is_done])
    unit, out, settings = units[name], contents.root / "again" / role, bounded_settings(info)
    before = {one.position: one.sample for one in units.values() if one.position <= unit.position}
    run_generation(
        lambda: load_pipeline(directory),
        [
            before[position] for position in sorted(before)
        ],  # whose number decides the seed, where the scheme counts them
        settings,
        out,
        model=model,
        samples_per_prompt=unit.k + 1,
        shard=Shard(unit.position * (unit.k + 1) + unit.k, (unit.position + 1) * (unit.k + 1)),
        device=device,
    )
    run = read_run(out)
    again = run.units[name].line
    different = [key for key in _BITS if getattr(again, key) != getattr(line, key)]
    if different:
        raise DamagedFileError(
            f"{name} of the {role}: {', '.join(different)} differ. {_conditions(line, again, info.versions)}"
        )
    return run


def _conditions(line: ManifestLine, again: ManifestLine, recorded: dict[str, str]) -> str:
    installed = {name: version(name) for name in recorded if name != "ptq"}
    versions = "the same" if installed.items() <= recorded.items() else "other"
    return f"Recorded on {line.device}, here {again.device}, with {versions} library versions; bit-equality is promised on the same hardware and versions only."
