"""A resumable, sharded run: which units, in which order, how often; the work on one unit is `worker.py`'s.

Order: this shard's unfinished units, then those that failed once more for each retry, then, with `take_over`, unfinished
units of the other shards. The model is loaded once, and only when there is a unit to make.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq import ui
from ptq.errors import PtqError
from ptq.generation.claims import Claims
from ptq.generation.directory import GenerationDirectory, comparable, describe_run
from ptq.generation.dry_run import unit_bytes
from ptq.generation.integrity import select_pending
from ptq.generation.settings import Settings
from ptq.generation.units import Unit, make_units
from ptq.prompts.sample import Sample
from ptq.store.run_info import RunPlan
from ptq.store.run_manifest import Manifests
from ptq.store.sharding import Shard
from ptq.ui.progress import Progress, format_seconds
from ptq.wan.identity import ModelIdentity

if TYPE_CHECKING:
    from ptq.generation.latent import FixedLatent
    from ptq.generation.sampling import Sampler
    from ptq.generation.worker import Result, Worker
    from ptq.wan.encoding import TextEncoding

MAX_FAILURES_IN_A_ROW = 5
"""So many mean that the cause is not in the units."""
_POLL_SECONDS = 2.0


@dataclass
class Summary:
    """What this process did. kept: units that were finished before. failed: unit name -> error, after all retries.

    elsewhere: units of this shard that another process made meanwhile. not_started: units left untouched because
    the run stopped after too many failures. taken_over: units of other shards that were made here.
    """

    shard: Shard
    kept: int = 0
    done: int = 0
    taken_over: int = 0
    elsewhere: int = 0
    not_started: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def remaining(self) -> int:
        """Units of this shard that still have to be made; the exit code is 1 unless it is 0."""
        return len(self.failed) + self.not_started

    def as_json(self) -> dict[str, Any]:
        """The summary as a JSON object."""
        shard, seconds = f"{self.shard.index}/{self.shard.count}", round(self.seconds, 3)
        return {**vars(self), "shard": shard, "seconds": seconds, "remaining": self.remaining}

    def describe(self) -> str:
        """One sentence for people."""
        parts = [f"{self.done} made in {format_seconds(self.seconds)}", f"{self.kept} were there already"]
        if self.taken_over:
            parts.append(f"{self.taken_over} of them taken over from other shards")
        if self.elsewhere:
            parts.append(f"{self.elsewhere} made by other processes")
        parts += [f"{len(self.failed)} failed", f"{self.remaining} remain"]
        return ", ".join(parts) + "."


def run_generation(
    pipe_loader: Callable[[], Any],
    samples: Sequence[Sample],
    settings: Settings,
    out: str | Path,
    *,
    model: ModelIdentity,
    shard: Shard | None = None,
    samples_per_prompt: int = 1,
    prompts: dict[str, Any] | None = None,
    fresh: bool = False,
    retries: int = 1,
    take_over: bool = False,
    stale_minutes: float = 10.0,
    device: str = "cpu",
    offload: str = "none",
    encoding: TextEncoding | None = None,
    fixed: FixedLatent | None = None,
) -> Summary:
    """Make this shard's units of a run, or what is left of them.

    Args:
        pipe_loader: gives a WanPipeline or WanImageToVideoPipeline on the CPU; called at most once.
        samples: all samples of the run, also those of other shards, in the order that every shard sees.
        out: the run's directory (docs/architecture.md).
        model: which weights these are; another digest is another run.
        prompts: where the samples come from (file, format, digest), recorded in `run.json`.
        fresh: delete what the run made and start over. With several shards each deletes its own part.
        retries: further attempts at a unit that failed; not for unusable model output, which would come again.
        take_over: when done, make unfinished units of shards that do not; wait for those in work.
        stale_minutes: a claim without a sign of life for so long is dead.
        device, offload: where to compute; offload is one of `ptq.wan.pipeline.OFFLOAD_MODES`.
        encoding: encodes the prompts before `pipe_loader` gives a pipeline without text encoder; None: it has its own.
        fixed: the initial latent of every unit, where the settings name one.

    Raises:
        UsageError: contradictory request, or settings that do not fit the model.
        PtqError: the directory is in use or holds another run; the disk is full; the GPU was lost.
    """

    shard, started = shard or Shard(), time.monotonic()
    settings.check_samples(samples_per_prompt)
    units = make_units(samples, samples_per_prompt)
    own = shard.select(units)
    planned = {"fixed_latent": str(fixed.path)} if fixed else {}
    plan = RunPlan(
        units=len(units), samples_per_prompt=samples_per_prompt, shards=shard.count, prompts=prompts, **planned
    )
    info = describe_run(settings, model, units[0].sample.dataset, plan)
    directory, manifests = GenerationDirectory(out, info, shard, own), Manifests(Path(out), shard)
    summary = Summary(shard)
    with (
        directory.hold(comparable(info), fresh=fresh),
        Claims(directory.state, shard, stale_minutes * 60) as claims,
    ):
        manifests.drop_torn_line()
        manifests.refresh()
        pending = select_pending(directory.path, manifests, own, settings)
        claims.sweep({unit.stem for unit in own} - {unit.stem for unit in pending})
        summary.kept = len(own) - len(pending)
        _warn_about_disk(directory, len(pending) * unit_bytes(settings))
        others = [unit for i, unit in enumerate(units) if i % shard.count != shard.index] if take_over else []

        def load_sampler() -> Sampler:
            if encoding is not None:  # before anything else takes the memory
                left = [unit for unit in others if manifests.get(unit.name) is None]
                encoding.prepare(unit.sample.prompt for unit in (*pending, *left))
            if settings.context_parallel > 1:
                from ptq.generation.group import LeadingSampler

                return LeadingSampler(pipe_loader, settings, device, encoding, fixed)
            from ptq.generation.sampling import Sampler

            return Sampler(pipe_loader(), settings, device, offload, encoding, fixed)

        if pending or others:
            from ptq.generation.worker import Worker

            worker = Worker(directory, manifests, claims, model, load_sampler, device)
            loop = _Loop(worker, settings.steps, summary)
            loop.make_own(pending, retries)
            if not summary.not_started:
                loop.finish(others)
    summary.seconds = time.monotonic() - started
    return summary


class _Loop:
    """Passes over units; counts results into the summary."""

    def __init__(self, worker: Worker, steps: int, summary: Summary) -> None:
        self._worker, self._steps, self._summary = worker, steps, summary
        self._in_a_row = 0
        self._elsewhere: list[Unit] = []

    def make_own(self, pending: list[Unit], retries: int) -> None:
        """Make the shard's units; try those that failed again."""
        again = self._pass(f"Generating shard {self._summary.shard.index}/{self._summary.shard.count}", pending)
        for attempt in range(retries):
            if again and not self._summary.not_started:
                again = self._pass(f"Retry {attempt + 1} of {retries}", again)

    def _pass(self, title: str, units: list[Unit]) -> list[Unit]:
        """One pass; returns the units that failed and may succeed another time."""
        if not units:
            return []
        again = []
        with ui.progress(title, len(units) * self._steps) as bar:
            for position, unit in enumerate(units):
                result = self._make(unit, bar, f"video {position + 1}/{len(units)}")
                self._summary.done += result == "done"
                if result == "elsewhere":
                    self._elsewhere.append(unit)
                if result == "failed":
                    again.append(unit)
                if self._in_a_row >= MAX_FAILURES_IN_A_ROW and position + 1 < len(units):
                    self._summary.not_started = len(units) - position - 1
                    ui.warn(
                        f"{self._in_a_row} units failed one after another, so the cause is probably not in the units: stopped, {self._summary.not_started} not started. The reasons are above and in the manifest."
                    )
                    break
        return again

    def _make(self, unit: Unit, bar: Progress, label: str) -> Result:
        """Make one unit, moving the bar by its steps however far it gets."""
        started, reached = time.monotonic(), 0

        def on_step(step: int) -> None:
            nonlocal reached
            left = (time.monotonic() - started) / step * (self._steps - step)
            bar.advance(
                step - reached, f"{label}, step {step}/{self._steps}, {format_seconds(left)} left of this video"
            )
            reached = step

        result = self._worker.make(unit, on_step)
        if reached < self._steps:
            bar.advance(self._steps - reached, f"{label} {result}")
        if result in ("failed", "broken"):
            line = self._worker.manifests.by_shard[self._summary.shard.tag][unit.name]
            self._summary.failed[unit.name] = str(line.error)
            self._in_a_row += 1
        else:
            self._summary.failed.pop(unit.name, None)
            self._in_a_row = 0
        return result

    def finish(self, others: Sequence[Unit]) -> None:
        """Make what nobody has made yet: units of `others`, and own ones that another process had in work.

        From the end of the list, where their owners come last. Units in a living process's hands are waited for: they
        are finished there, or go stale and are made here. Units recorded as failed are left to their owners.
        """
        manifests, claims = self._worker.manifests, self._worker.claims
        own = {unit.name for unit in self._elsewhere}
        candidates = [*others, *self._elsewhere]
        awaited = ""
        while True:
            manifests.refresh()
            waiting = [unit for unit in reversed(candidates) if manifests.get(unit.name) is None]
            if not waiting:
                self._summary.elsewhere = len(own)
                return
            unit = next((unit for unit in waiting if not claims.is_held_elsewhere(unit.stem)), None)
            if unit is None:
                holders = ", ".join(sorted({claims.holder(unit.stem) for unit in waiting}))
                if holders != awaited:
                    awaited = holders
                    ui.info(
                        f"Waiting for {len(waiting)} units in the hands of {holders}; those that give no sign of life for {format_seconds(claims.stale_seconds)} are made here."
                    )
                time.sleep(_POLL_SECONDS)
                continue
            with ui.progress(f"Taking over {unit.name}", self._steps) as bar:
                result = self._make(unit, bar, "video")
            if result == "done":
                self._summary.done += 1
                self._summary.taken_over += unit.name not in own
                own.discard(unit.name)
            if self._in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise PtqError(f"{self._in_a_row} units failed one after another; stopped taking over units.")


def _warn_about_disk(directory: GenerationDirectory, needed: int) -> None:
    free = directory.free_bytes()
    if needed > free:
        ui.warn(
            f"The videos of this shard need about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free where {directory.path} lies. The run stops cleanly when the disk is full, and continues when there is room."
        )
