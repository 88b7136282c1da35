"""The calibrate stage: prompts in, a calibration directory out. Resumes per prompt; shards share one directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq import ui
from ptq.calibration.directory import CalibrationDirectory
from ptq.calibration.schedule import choose_steps, sampling_schedule
from ptq.prompts import RESIZE_POLICY, Sample, caption_digest, fit_image, load_image, unit_seed
from ptq.store.calibration import CalibrationInfo, RecordedSample, Step
from ptq.store.files import digest, sha256_file, write_tensors
from ptq.store.locks import directory_mutex
from ptq.store.lora import LoraInfo
from ptq.store.records import (
    BRANCHES,
    INDEX_FILE,
    NEGATIVE_FILE,
    Record,
    prompt_file,
    read_embeds,
    read_prompt_records,
    write_index,
    write_prompt,
)
from ptq.store.sharding import Shard
from ptq.wan.layout import ModelLayout
from ptq.wan.pipeline import call_arguments, on_execution_device, set_flow_shift
from ptq.wan.presets import ModelPreset

if TYPE_CHECKING:
    from ptq.calibration.recorder import Capture
    from ptq.wan.encoding import TextEncoding


@dataclass(frozen=True)
class CalibrationPlan:
    """Everything that decides the records.

    Attributes:
        layout: the model.
        preset: sizes, steps and guidance, overrides applied.
        samples: the prompts, in order.
        records_per_prompt: denoiser calls kept of each prompt (with guidance two of each chosen step).
        seed: base seed.
        prompts_file: name and digest of the prompt file, for the record.
        loras: expert -> LoRA that is merged into it.
    """

    layout: ModelLayout
    preset: ModelPreset
    samples: Sequence[Sample]
    records_per_prompt: int
    seed: int
    prompts_file: dict[str, str]
    loras: Mapping[str, LoraInfo] = field(default_factory=dict)

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches the sampler calls at each step."""
        return branches_of(self.preset)

    @property
    def steps_per_prompt(self) -> int:
        """Chosen steps of each prompt."""
        return max(1, self.records_per_prompt // len(self.branches))

    @property
    def record_count(self) -> int:
        """Records of all prompts, both branches."""
        return len(self.samples) * len(self.branches) * self.steps_per_prompt

    def info(self) -> CalibrationInfo:
        """calibration.json before the first record."""
        samples = [
            RecordedSample(dataset=s.dataset, id=s.id, caption_digest=caption_digest(s.prompt)) for s in self.samples
        ]
        return CalibrationInfo(
            variant=self.preset.variant,
            experts={name: digest(config) for name, config in self.layout.experts.items()},
            preset=self.preset.model_dump(),
            prompts=self.prompts_file,
            samples=samples,
            records_per_prompt=self.records_per_prompt,
            seed=self.seed,
            image_policy=RESIZE_POLICY if self.layout.needs_image else None,
            complete=False,
            files={},
            lora=dict(self.loras),
        )


def branches_of(preset: ModelPreset) -> tuple[str, ...]:
    """Branches the sampler calls at each step: with guidance also the unconditional one."""
    return BRANCHES if preset.guided else BRANCHES[:1]


def calibrate(
    plan: CalibrationPlan,
    load: Callable[[], Any],
    out: Path,
    *,
    shard: Shard | None = None,
    fresh: bool = False,
    encoding: TextEncoding | None = None,
) -> dict[str, Any]:
    """Record the plan's denoiser calls into `out`.

    Args:
        plan: what to record.
        load: loads the pipeline; called only when something is left to record.
        out: calibration directory; finished prompts in it are kept.
        shard: the part of the prompts that this process records; default all.
        fresh: delete an earlier run in `out` first.
        encoding: encodes the prompts before `load` gives a pipeline without text encoder; None: the pipeline has its own.

    Returns:
        The content of calibration.json; "complete" is true once every prompt of every shard is there.

    Raises:
        UsageError: `out` holds a run with other settings (names the difference).
        PtqError: another process records this shard; prompts without their image; disk full.
    """
    shard = shard or Shard()
    own = shard.select(range(len(plan.samples)))
    directory = CalibrationDirectory(out, plan.info(), shard, own)
    with directory.hold(plan.info().decisive(), fresh=fresh):
        directory.adopt_earlier()
        todo = _missing(plan, directory, own)
        if todo:
            if encoding is not None:
                encoding.prepare(plan.samples[index].prompt for index in todo)
            _record(plan, load(), todo, directory, encoding)
        with directory_mutex(directory.state):
            return _finish(plan, directory).as_json()


def _record(
    plan: CalibrationPlan,
    pipeline: Any,
    todo: Sequence[int],
    directory: CalibrationDirectory,
    encoding: TextEncoding | None,
) -> None:
    pipeline.set_progress_bar_config(disable=True)
    set_flow_shift(pipeline, plan.preset.flow_shift)
    schedule = sampling_schedule(pipeline, plan.preset.steps)
    directory.begin(schedule)
    with ui.progress("Recording prompts", len(todo)) as bar:
        for index in todo:
            capture = _record_one(plan, pipeline, schedule, index, directory.path, encoding)
            made = [prompt_file(directory.path, index)]
            if capture.negative_embeds is not None:
                made.append(directory.path / NEGATIVE_FILE)
                write_tensors(made[-1], {"prompt_embeds": capture.negative_embeds})
            directory.vouch(*made)
            bar.advance(note=f"{len(capture.records)} records")


def _missing(plan: CalibrationPlan, directory: CalibrationDirectory, indices: Sequence[int]) -> list[int]:
    """Prompts whose file is absent, or not the one that was made (a message says so); one of them again where only the
    negative embedding is missing.
    """
    known = directory.info.files
    paths = {index: prompt_file(directory.path, index) for index in indices}
    missing = [index for index, path in paths.items() if not _is_intact(path, known) or not read_prompt_records(path)]
    damaged = [paths[index] for index in missing if paths[index].exists()]
    if not missing and indices and "uncond" in plan.branches:
        negative = directory.path / NEGATIVE_FILE
        if not _is_intact(negative, known) or read_embeds(negative) is None:
            missing, damaged = [indices[0]], [negative] if negative.exists() else []
    if damaged:
        ui.warn(
            f"{damaged[0]} is not a file whose digest was noted when it was recorded: it was changed, or its recording was interrupted ({len(damaged)} such files). It is recorded again."
        )
    return missing


def _is_intact(path: Path, known: Mapping[str, str]) -> bool:
    """Whether a file is the one whose digest was noted when it was made."""
    return path.name in known and path.is_file() and sha256_file(path) == known[path.name]


def _record_one(
    plan: CalibrationPlan, pipeline: Any, schedule: list[Step], index: int, out: Path, encoding: TextEncoding | None
) -> Capture:
    from ptq.calibration.recorder import record_prompt

    sample = plan.samples[index]
    image = None
    if plan.layout.needs_image and sample.media is not None:
        image = fit_image(load_image(sample.media), plan.preset.height, plan.preset.width)
    path = prompt_file(out, index)
    seed = unit_seed(plan.seed, sample.dataset, sample.id, 0)
    embeds = None if encoding is None else on_execution_device(pipeline, encoding.arguments(sample.prompt))
    arguments = call_arguments(plan.preset, sample.prompt, seed, image, embeds)
    capture = record_prompt(
        pipeline,
        arguments,
        choose_steps(schedule, plan.steps_per_prompt, index),
        prompt_index=index,
        sample_id=sample.id,
        file=str(path.relative_to(out)),
    )
    write_prompt(path, capture.records, capture.tensors)
    return capture


def _finish(plan: CalibrationPlan, directory: CalibrationDirectory) -> CalibrationInfo:
    """Rebuild records.jsonl from the files; mark the set complete when no prompt is missing, of this or another shard."""
    info, out = directory.info, directory.path
    unfinished = info.model_copy(update={"complete": False})
    records: list[Record] = []
    hashes: dict[str, str] = {}
    for index in range(len(plan.samples)):
        path = prompt_file(out, index)
        found = read_prompt_records(path) if _is_intact(path, info.files) else None
        if found is None:
            return unfinished
        records += found
        hashes[path.name] = info.files[path.name]
    write_index(out, records)
    hashes[INDEX_FILE] = sha256_file(out / INDEX_FILE)
    if "uncond" in plan.branches:
        if not _is_intact(out / NEGATIVE_FILE, info.files):
            return unfinished
        hashes[NEGATIVE_FILE] = info.files[NEGATIVE_FILE]
    whole = digest({"settings": plan.info().decisive(), "files": hashes})
    info = info.model_copy(update={"complete": True, "files": hashes, "digest": whole})
    info.write(directory.settings_path)
    return info
