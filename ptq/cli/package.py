"""`ptq package` and `ptq verify`: make a submission, and check one."""

from __future__ import annotations

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
    from ptq.submission.package import check_submittable, estimated_bytes
    from ptq.submission.package import package as run

    judged = read_evaluation(evaluation)
    check_submittable(checkpoint, read_manifest(checkpoint), judged, allow_failing=allow_failing_gate)
    ui.info(f"Weights to pack: {ui.format_bytes(estimated_bytes(checkpoint))}.")
    if dry_run:
        return
    report = render(Sources(evaluation, checkpoint))
    size = run(checkpoint, evaluation, out, report, allow_failing=allow_failing_gate)
    ui.info(f"{out}: {ui.format_bytes(size)}. Check it with `ptq verify {out}`.")


def verify(
    archive: Annotated[Path, typer.Argument(help="Archive written by `ptq package`.", show_default=False)],
    max_gb: Annotated[float, options.number("--max-gb", 0.0, 1e6, "Refuse to unpack more than this.")] = 64.0,
    regenerate: Annotated[bool, typer.Option(help="Generate one unit again and compare its hash.")] = True,
    as_json: options.Json = False,
) -> None:
    """Check a submission: members, checksums, block budget, evaluation, loading, one unit generated again.

    Example: ptq verify submission.tar.gz
    """
    from ptq.submission.verify import verify as run

    if not archive.is_file():
        raise UsageError(f"{archive} does not exist. Pass an archive written by `ptq package`.")
    quiet_libraries()
    checks = run(archive, max_bytes=int(max_gb * 1e9), regenerate=regenerate)
    if as_json:
        print_json([vars(check) for check in checks])
    else:
        rows = [(check.name, "yes" if check.problem is None else "NO", check.problem or "") for check in checks]
        ui.table(f"{archive}", ("check", "holds", "found"), rows)
    if any(check.problem for check in checks):
        raise typer.Exit(1)
