"""Proof that a change of the package changes no code byte: the same small jobs with two checkouts, compared byte by byte.

    python scripts/compare_checkouts.py BEFORE AFTER --out DIR
    python scripts/compare_checkouts.py BEFORE AFTER --out DIR --jobs 'quantize/*-hif4-*' 'module/*'

BEFORE and AFTER are directories that hold the package (`git worktree add /tmp/before v0.1`). Every job runs once with each,
on the CPU, one after the other, in a process of its own; its results are compared when both sides are there. A result is kept
and used again as long as neither the sources it was made with nor what it was made from changed, so an interrupted comparison
continues. Prints a table, writes DIR/summary.json, exits with 1 where anything differs.

Compared whole, as bytes, is every file except what `MASKED` names in a few JSON files: times, memory, versions, the spelling of
the recipe, and digests over these. The jobs spell recipes with today's keys; `spell` is their translation for checkouts that
have flat keys.

The embedded models are cut to two blocks an expert (`cut`, `cut-i2v`) where many recipes are tried; `tiny` runs whole with the
recipes that are installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparison.differences import compare_directories
from comparison.inputs import make_inputs
from comparison.jobs import Job, chosen_jobs

WORKER = Path(__file__).resolve().parent / "comparison/worker.py"


class Side:
    """One checkout and the results made with it: <root>/<job>, <job>.log, and <job>.done once it succeeded or failed.

    Args:
        inputs: what the jobs read, made by `make_inputs`.
    """

    def __init__(self, checkout: Path, root: Path, inputs: Path, threads: int) -> None:
        self.checkout, self.root, self._threads = checkout.resolve(), root.resolve(), threads
        recipe = (self.checkout / "ptq/configs/recipes/rtn.yaml").read_text()
        self.flat = "solver:" not in recipe and "scheme:" not in recipe
        self._sources = _digest(
            str(threads), _digest_below(self.checkout / "ptq"), _digest_below(inputs), WORKER.read_bytes()
        )
        self._keys: dict[str, str] = {}

    def key(self, job: Job) -> str:
        """Identity of what a job's result follows from."""
        self._keys[job.name] = _digest(
            self._sources, *job.arguments(self.flat), *(self._keys[name] for name in job.needs)
        )
        return self._keys[job.name]

    def done(self, job: Job) -> dict[str, Any] | None:
        """How the job ended when it ran: {key, code, seconds}; None where it has not, or from something else."""
        path = self.root / f"{job.name}.done"
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("key") == self._keys[job.name] else None

    def run(self, jobs: Sequence[Job]) -> None:
        """Run what is not there yet."""
        todo = []
        for job in jobs:
            key = self.key(job)
            if (self.done(job) or {}).get("code") != 0:
                todo.append({"name": job.name, "key": key, "command": job.arguments(self.flat)})
        print(
            f"{self.root.name}: {len(jobs) - len(todo)} jobs are there already, {len(todo)} to run with {self.checkout}",
            flush=True,
        )
        if not todo:
            return
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(self._threads))
        environment = (
            os.environ | threads | {"PYTHONPATH": str(self.checkout), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}
        )
        self.root.mkdir(parents=True, exist_ok=True)
        worker = [sys.executable, str(WORKER), str(self.checkout)]
        subprocess.run(worker, input=json.dumps(todo), text=True, cwd=self.root, env=environment, check=True)


def _digest(*parts: str | bytes) -> str:
    return hashlib.sha256(b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)).hexdigest()


def _digest_below(directory: Path) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return _digest(*(part for path in files for part in (str(path.relative_to(directory)), path.read_bytes())))


@dataclass(frozen=True)
class Outcome:
    """One job on both sides. `masked`: files that are equal but for masked keys. `difference`: the first one, None: equal."""

    job: str
    files: int
    masked: int
    difference: str | None
    seconds: tuple[float, float]


def compare_job(before: Side, after: Side, job: Job) -> Outcome:
    """Compare what a job left on both sides."""
    ends = {side: side.done(job) or {"code": None, "seconds": 0.0} for side in (before, after)}
    seconds = (ends[before]["seconds"], ends[after]["seconds"])
    failed = [
        f"exit code {end['code']} {side.root.name}: {_last_line(side.root / f'{job.name}.log')}"
        for side, end in ends.items()
        if end["code"] != 0
    ]
    if failed:
        return Outcome(job.name, 0, 0, "; ".join(failed), seconds)
    files, masked, difference = compare_directories(before.root / job.name, after.root / job.name)
    return Outcome(job.name, files, masked, difference, seconds)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing said")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("after", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", nargs="+", default=[], metavar="PATTERN", help="only these, and what they need")
    parser.add_argument(
        "--threads", type=int, default=1, help="of both sides; sums of several threads may round differently"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the jobs and stop")
    args = parser.parse_args()
    jobs = chosen_jobs(args.jobs)
    if args.list:
        print("\n".join(job.name for job in jobs))
        return 0
    if not jobs or args.before is None or args.after is None or args.out is None:
        parser.error("BEFORE, AFTER, --out, and a pattern that some job matches are needed")
    inputs = args.out / "inputs"
    make_inputs(args.before, inputs)
    before = Side(args.before, args.out / "before", inputs, args.threads)
    after = Side(args.after, args.out / "after", inputs, args.threads)
    for side in (before, after):
        side.run(jobs)
    outcomes = [compare_job(before, after, job) for job in jobs]
    show(outcomes)
    rows = [asdict(outcome) for outcome in outcomes]
    summary = {"before": str(before.checkout), "after": str(after.checkout), "threads": args.threads, "jobs": rows}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(outcome.difference for outcome in outcomes))


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the table, what differs last."""
    width = max(len(outcome.job) for outcome in outcomes)
    print(f"\n{'job':{width}}  files  but for masked keys  seconds before, after  result")
    for outcome in sorted(outcomes, key=lambda outcome: outcome.difference is not None):
        a, b = outcome.seconds
        print(
            f"{outcome.job:{width}}  {outcome.files:5}  {outcome.masked:19}  {a:14} {b:6}  {outcome.difference or 'equal'}"
        )
    bad = sum(outcome.difference is not None for outcome in outcomes)
    print(
        f"\n{len(outcomes)} jobs, {sum(outcome.files for outcome in outcomes)} files: {f'{bad} jobs differ' if bad else 'everything is equal'}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
