"""`ptq evaluate`: two generation directories in, one evaluation directory out.

Order of work: read and pair the runs, measure every pair (resumable), collect the scores of the suite's gate
(adherence, or VBench), compare, judge, write. The numbers in evaluation.json are the only ones: the table, the
reports and the archive read them from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptq.errors import PtqError, UsageError
from ptq.evaluation import findings
from ptq.evaluation.conclude import Judgement, conclude, header, measure_yardstick
from ptq.evaluation.overlap import check_overlap
from ptq.evaluation.pairs import measure_units
from ptq.evaluation.runs import Pairing, Run, Unit, pair_runs, read_run
from ptq.evaluation.scores import Scores, scores_from_units
from ptq.evaluation.suites import Suite, get_suite, vbench_suites
from ptq.evaluation.vbench.results import imported_scores
from ptq.evaluation.vbench.run import VBenchSettings, check_vbench, run_vbench
from ptq.rules import GATE, LIMITS_IN_WORDS, RESAMPLES, RULES
from ptq.store.evaluation import FILE, Evaluation, RunSide, Yardstick
from ptq.store.evaluation_units import FILE as UNITS_FILE
from ptq.store.evaluation_units import UnitLine, write_units
from ptq.store.files import sha256_file, sweep_partials
from ptq.store.run_directory import OutputDirectory, hold_whole

YARDSTICK = "yardstick"
"""Folder of the yardstick's units below an evaluation directory, and what texts call it."""


class EvaluationDirectory(OutputDirectory):
    """The results of one comparison. Which units are kept is decided line by line (`pairs.py`), so no settings refuse."""

    kind, settings_file = "directory of an earlier evaluation", FILE

    def foreign(self) -> str | None:
        """Other files; measured units of an evaluation that was stopped are none."""
        return None if (self.path / UNITS_FILE).exists() else super().foreign()

    @contextmanager
    def measuring(self, runs: Sequence[Path], *, fresh: bool) -> Iterator[None]:
        """Hold the directory while the block runs.

        Raises:
            UsageError: it holds something else, or is one of the runs. PtqError: another process holds it.
        """
        if any(self.path.resolve() == run.resolve() for run in runs):
            raise UsageError(f"{self.path} is one of the runs. Give --out another directory.")
        with hold_whole(self.path):
            self.refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            sweep_partials(self.path)
            if fresh:
                for folder in (self.path, self.path / YARDSTICK):
                    (folder / UNITS_FILE).unlink(missing_ok=True)
            yield


def evaluate_runs(
    reference: Path,
    candidate: Path,
    out: Path,
    *,
    suite: str = "core",
    format: str | None = None,
    allow_missing: bool = False,
    allow_differences: Sequence[str] = (),
    allow_overlap: bool = False,
    stride: int = 1,
    resamples: int = RESAMPLES,
    seed: int = 0,
    gate: str = GATE,
    import_vbench: tuple[Path, Path] | None = None,
    vbench: VBenchSettings | None = None,
    dimensions: Sequence[str] | None = None,
    yardstick: Path | None = None,
    fresh: bool = False,
) -> Evaluation:
    """Compare two generation directories and write `out`/evaluation.json and `out`/units.jsonl.

    Args:
        reference, candidate: directories written by `ptq generate` from the same prompts and seeds.
        suite: a name of `suites.suite_names()`. VBench suites need `import_vbench` (two result files) or `vbench`.
        format: a format of the rules, which sets the limit; by default what the candidate's run.json says.
        allow_differences: settings that may differ though they change videos, see `runs.NAMED_DIFFERENCES`.
        allow_overlap: evaluate prompts that the checkpoint was calibrated with, and say so, instead of refusing.
        stride: take SSIM, sharpness and saturation on every stride-th frame.
        dimensions: a subset of a VBench suite's dimensions; the evaluation then says which are missing.
        yardstick: a run of another model, measured against the same reference and shown beside the candidate.
        fresh: measure again instead of reusing results already in `out`.

    Raises:
        UsageError: contradictory options. PtqError: unpaired or incomplete runs. DamagedFileError: a damaged artifact.
    """
    chosen, asked = get_suite(suite).narrowed(dimensions), Judgement(format, gate, resamples, seed)
    if stride < 1:
        raise UsageError(f"--stride is {stride}; it must be 1 or more.")
    if chosen.is_vbench and (import_vbench is None) == (vbench is None):
        raise UsageError(f"Suite {suite} needs either --import-vbench REF CAND or --vbench-python PYTHON.")
    if not chosen.is_vbench and (import_vbench or vbench):
        raise UsageError(f"Suite {suite} does not use VBench; choose one of {vbench_suites()} for those options.")
    if yardstick is not None and import_vbench is not None:
        raise UsageError(
            "--yardstick cannot be used with --import-vbench, which has the scores of two runs only. Score the videos here with --vbench-python, or leave out one of the two."
        )
    if vbench is not None:
        check_vbench(chosen, vbench)  # before measuring, which takes hours
    runs = read_run(reference), read_run(candidate)
    beside = None if yardstick is None else read_run(yardstick)
    taken = [path for path in (reference, candidate, yardstick) if path is not None]
    with EvaluationDirectory(out).measuring(taken, fresh=fresh):
        judgement = replace(asked, format=_resolve_format(format, runs[1], chosen))
        paired: dict[str, Any] = {"allow_missing": allow_missing, "allow_differences": allow_differences}
        pairing = pair_runs(*runs, **paired)
        others = [] if beside is None else _beside(pairing, pair_runs(runs[0], beside, **paired))
        overlap, extra = check_overlap(runs[1], (unit.name for _, unit in pairing.pairs), allow=allow_overlap)
        lines = measure_units(pairing.pairs, out, chosen, stride=stride)
        if import_vbench is not None:
            scores = imported_scores(*import_vbench, chosen, pairs=pairing.pairs, allow_missing=allow_missing)
        elif vbench is not None:
            scores = run_vbench(pairing.pairs, chosen, vbench, out / "vbench", allow_missing=allow_missing, fresh=fresh)
        else:
            scores = scores_from_units(lines, chosen.gate)
        digests = [run.info.checkpoint.digest for run in runs]
        content = {
            **header(chosen, judgement),
            "reference": runs[0].describe(),
            "candidate": runs[1].describe(),
            "units": len(lines),
            "excluded": pairing.excluded,
            "overlap": overlap,
            "stride": stride,
            "sources": dict(Counter(line.source for line in lines)),
        }
        extra += findings.allowed_differences(runs[0].info, runs[1].info)
        extra += findings.pairing_warnings(pairing.excluded, digests[0] is not None and digests[0] == digests[1])
        extra += findings.condition_warnings(runs[0].info, runs[1].info) + findings.digest_warnings(*runs)
        extra += findings.settings_warnings(chosen, runs[1].info)
        extra += findings.prompt_warnings(chosen, (unit.score_prompt for unit, _ in pairing.pairs))
        evaluation = conclude(content, chosen, judgement, scores, lines, extra)
        if beside is not None:
            measured = _measure_yardstick(
                runs[0], beside, others, out, chosen, judgement, stride, vbench, allow_missing
            )
            evaluation = evaluation.model_copy(update={"yardstick": measured})
        return _write(out, evaluation, lines, scores)


def _beside(pairing: Pairing, other: Pairing) -> list[tuple[Unit, Unit]]:
    """The pairs of reference and yardstick whose unit is compared."""
    compared = {unit.name for unit, _ in pairing.pairs}
    found = [pair for pair in other.pairs if pair[0].name in compared]
    if not found:
        raise PtqError(
            "The yardstick has none of the units that the two runs have in common. Generate it from the same prompts."
        )
    return found


def _measure_yardstick(
    reference: Run,
    run: Run,
    pairs: list[tuple[Unit, Unit]],
    out: Path,
    suite: Suite,
    judgement: Judgement,
    stride: int,
    vbench: VBenchSettings | None,
    allow_missing: bool,
) -> Yardstick:
    """Measure and score another run, in a folder of its own below `out`; scores of the reference are not made again."""
    (out / YARDSTICK).mkdir(exist_ok=True)
    lines = measure_units(pairs, out / YARDSTICK, suite, stride=stride)
    if vbench is not None:
        roles = ("reference", YARDSTICK)
        scores = run_vbench(pairs, suite, vbench, out / "vbench", allow_missing=allow_missing, roles=roles)
    else:
        scores = scores_from_units(lines, suite.gate)
    write_units(out / YARDSTICK, _with_scores(lines, scores))
    extra = findings.allowed_differences(reference.info, run.info, YARDSTICK)
    extra += findings.condition_warnings(reference.info, run.info, YARDSTICK)
    seen, _ = check_overlap(run, (unit.name for _, unit in pairs), allow=True)
    extra += [f"{seen} of the evaluated prompts are among those that it was calibrated with."] if seen else []
    return measure_yardstick(run.describe(), suite, judgement, scores, lines, extra)


def evaluate_imported(
    reference: Path,
    candidate: Path,
    out: Path,
    *,
    suite: str = "icme2026",
    format: str,
    allow_missing: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    gate: str = GATE,
    dimensions: Sequence[str] | None = None,
) -> Evaluation:
    """Judge two VBench result files without the videos: units are paired by video file name.

    Args and errors as `evaluate_runs`; nothing proves here that the videos started from the same noise, and the
    evaluation says so.
    """
    chosen = get_suite(suite).narrowed(dimensions)
    if not chosen.is_vbench:
        raise UsageError(f"Suite {suite} is not made of VBench dimensions; choose one of {vbench_suites()}.")
    judgement = Judgement(_known(format), gate, resamples, seed)
    with EvaluationDirectory(out).measuring((), fresh=False):
        scores = imported_scores(reference, candidate, chosen, pairs=None, allow_missing=allow_missing)
        content = {
            **header(chosen, judgement),
            "reference": RunSide(file=str(reference)),
            "candidate": RunSide(file=str(candidate)),
            "units": len(scores.clusters),
            "excluded": {},
        }
        extra = ["Only VBench results were read: videos are paired by file name, and no manifest proves equal seeds."]
        extra += findings.prompt_warnings(chosen, scores.clusters.values())
        return _write(out, conclude(content, chosen, judgement, scores, None, extra), None, scores)


def _resolve_format(given: str | None, candidate: Run, suite: Suite) -> str | None:
    recorded = candidate.info.checkpoint.format
    if given and recorded and given != recorded:
        raise UsageError(
            f"{candidate.directory} was generated from a {recorded} checkpoint, but --format is {given}. The limit belongs to the format of the weights: leave --format out."
        )
    if suite.gate and not (given or recorded):
        raise UsageError(
            f"{candidate.directory} does not say which format it was generated with. Pass --format: {LIMITS_IN_WORDS}."
        )
    return _known(given) or recorded


def _known(given: str | None) -> str | None:
    """The value of --format. A checkpoint may be of a format without a rule; to name one asks for a limit."""
    if given is not None and given not in RULES:
        raise UsageError(f"--format is {given!r}; choose one of {', '.join(RULES)}.")
    return given


def _write(out: Path, evaluation: Evaluation, lines: list[UnitLine] | None, scores: Scores) -> Evaluation:
    """Write both files."""
    write_units(out, _with_scores(lines, scores))
    evaluation = evaluation.model_copy(update={"units_sha256": sha256_file(out / UNITS_FILE)})
    evaluation.write(out / FILE)
    return evaluation


def _with_scores(lines: list[UnitLine] | None, scores: Scores) -> list[UnitLine]:
    """The measured lines with the gate's scores merged in, or lines of the imported scores alone."""
    tables = {"reference": scores.reference, "candidate": scores.candidate}

    def of(unit: str) -> dict[str, dict[str, float]]:
        return {
            role: {name: rows[unit] for name, rows in table.items() if unit in rows} for role, table in tables.items()
        }

    imported = [UnitLine(unit=unit, reference={}, candidate={}, paired={}) for unit in sorted(scores.clusters)]
    return [line.merged(of(line.unit)) for line in lines or imported]
