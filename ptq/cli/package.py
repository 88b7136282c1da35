"""`ptq package` and `ptq verify`: make a submission, and check one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json, quiet_libraries
from ptq.errors import UsageError


def package(
    checkpoint: options.Checkpoint,
    evaluation: Annotated[Path, typer.Option("--evaluation", help="Directory written by `ptq evaluate`.")],
    out: Annotated[Path, typer.Option("--out", help="Archive to write.")] = Path("submission.tar.gz"),
    allow_failing_gate: Annotated[
        bool, typer.Option("--allow-failing-gate", help="Pack although the verdict is not PASS; the archive is marked.")
    ] = False,
    dry_run: options.DryRun = False,
) -> None:
    """Pack weights, source, report, prompts and evaluation into one archive with reproducible bytes.

    Example: ptq package tiny-hif4 --evaluation evaluation --out submission.tar.gz
    """
    from ptq.checkpoint.manifest import read_manifest
    from ptq.report import Sources, render
    from ptq.store.evaluation import read_evaluation
    from ptq.submission.package import check_submittable, planned
    from ptq.submission.package import package as run

    judged = read_evaluation(evaluation)
    check_submittable(checkpoint, read_manifest(checkpoint), judged, allow_failing=allow_failing_gate)
    sizes = {
        what: [path.stat().st_size for path in files] for what, files in planned(checkpoint, evaluation, judged).items()
    }
    if dry_run:
        rows = {what: f"{len(found)} files, {ui.format_bytes(sum(found))}" for what, found in sizes.items()}
        replaced = " (there already; it will be replaced)" if out.exists() else ""
        ui.details("Submission plan", {"verdict": judged.verdict or "none", **rows, "archive": f"{out}{replaced}"})
        return
    ui.info(f"Packing {checkpoint} into {out}: {ui.format_bytes(sum(map(sum, sizes.values())))} before compression.")
    report = render(Sources(evaluation, checkpoint))
    size = run(checkpoint, evaluation, out, report, allow_failing=allow_failing_gate)
    ui.info(f"{out}: {ui.format_bytes(size)}. Check it with `ptq verify {out}`.")


def verify(
    archive: Annotated[Path, typer.Argument(help="Archive written by `ptq package`.", show_default=False)],
    max_gb: Annotated[float, options.number("--max-gb", 0.001, 1e5, "Refuse to unpack more than this.")] = 64.0,
    regenerate: Annotated[bool, typer.Option(help="Generate one unit again and compare its hash.")] = True,
    as_json: options.Json = False,
) -> None:
    """Check every claim of a submission by the rules; list what an archive cannot prove. Exit 0: all that was checked holds.

    Example: ptq verify submission.tar.gz
    """
    if not archive.is_file():
        raise UsageError(f"{archive} does not exist. Pass an archive written by `ptq package`.")
    if not math.isfinite(max_gb):
        raise UsageError(f"--max-gb is {max_gb}; give a number of gigabytes.")
    ui.info(f"Checking {archive}{', generating one unit again' if regenerate else ''}.")

    from ptq.submission.verify import verify as run

    quiet_libraries()
    claims = run(archive, max_bytes=int(max_gb * 1e9), regenerate=regenerate)
    if as_json:
        print_json([claim.as_json() for claim in claims])
    else:
        words = {True: "yes", False: "NO", None: "-"}
        rows = [(c.name, c.how, words[c.holds], c.found) for c in claims]
        ui.table(f"{archive}", ("claim", "how", "holds", "found"), rows, numbers=False)
        failed, open_ = (sum(claim.holds is answer for claim in claims) for answer in (False, None))
        ui.info(f"{len(claims) - failed - open_} claims hold, {failed} do not, {open_} were not checked.")
    if any(claim.holds is False for claim in claims):
        raise typer.Exit(1)
