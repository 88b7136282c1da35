"""`ptq evaluate`: parse, measure, show. The verdict comes first; every number shown is one of evaluation.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import print_json, show_tables
from ptq.errors import UsageError
from ptq.rules import LIMITS_IN_WORDS

if TYPE_CHECKING:
    from ptq.store.evaluation import Evaluation

_VERDICT_STYLE = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}


def evaluate(
    reference: Annotated[
        Path | None, typer.Option(help="Generation directory of the original model (with --vbench-check: not needed).")
    ] = None,
    candidate: Annotated[Path | None, typer.Option(help="Generation directory of the quantized model.")] = None,
    out: Annotated[Path | None, options.OUT] = None,
    suite: Annotated[
        str, typer.Option(help="core (no verdict), tiny, icme2026, mlperf-t2v, vbench or vbench-i2v.")
    ] = "core",
    format: Annotated[
        str | None, options.format_option(f"{LIMITS_IN_WORDS}; by default what the candidate was made with.")
    ] = None,
    gate: Annotated[
        str, typer.Option(help="The deciding average: mean_signed, mean_absolute, mean_positive or mean_score.")
    ] = "mean_signed",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Use the units both runs have, and list the others.")
    ] = False,
    allow_difference: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-difference",
            metavar="OPTION",
            help="Pair runs that differ in this option: cache, attention-backend.",
        ),
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Judge on prompts that the checkpoint was calibrated with.")
    ] = False,
    stride: Annotated[int, typer.Option(min=1, help="Take SSIM, sharpness and saturation on every N-th frame.")] = 1,
    bootstrap: Annotated[
        int, typer.Option(min=1000, max=1_000_000, help="Bootstrap resamples of the intervals.")
    ] = 10_000,
    seed: Annotated[int, options.seed("Of the bootstrap.")] = 0,
    yardstick: Annotated[
        Path | None, typer.Option(help="Generation directory of another model, shown beside the candidate.")
    ] = None,
    dimensions: Annotated[
        str | None, typer.Option(help="Only these dimensions of a VBench suite, separated by commas.")
    ] = None,
    import_vbench: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="FILE FILE",
            help="Two *_eval_results.json, reference and candidate. Alone, without the runs, it means suite icme2026.",
        ),
    ] = None,
    vbench_python: Annotated[Path | None, typer.Option(help="Interpreter of an environment that has VBench.")] = None,
    vbench_root: Annotated[
        Path | None, typer.Option(help="VBench checkout, where the package is not installed.")
    ] = None,
    vbench_device: Annotated[str, typer.Option(help="Device VBench computes on.")] = "cuda",
    vbench_check: Annotated[
        bool, typer.Option("--vbench-check", help="List the weights each dimension needs, then stop.")
    ] = False,
    fresh: options.Fresh = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Compare videos of the quantized model with the original's, and judge the loss.

    The exit code is 0 when the comparison was made, whatever the verdict.

    Example: ptq evaluate --reference runs/bf16 --candidate runs/hif4 --out runs/eval --suite icme2026 --vbench-python
    ~/vbench/bin/python
    """
    from ptq.evaluation.runs import check_differences

    differences = allow_difference or []
    check_differences(differences)
    wanted = dimensions.replace(",", " ").split() if dimensions else None
    if vbench_check:
        _show_weights(suite, wanted, vbench_python, vbench_root, as_json)
        return
    if vbench_root is not None and vbench_python is None:
        raise UsageError("--vbench-root needs --vbench-python, the interpreter that has VBench's dependencies.")
    without_runs = reference is None and candidate is None and import_vbench is not None
    if without_runs and yardstick is not None:
        raise UsageError("--yardstick is measured against the run of --reference; give --reference and --candidate.")
    if not without_runs and (reference is None or candidate is None):
        raise UsageError("Give both --reference and --candidate, or --import-vbench with two result files.")
    if dry_run:
        pairing = {"allow_missing": allow_missing, "allow_differences": differences, "allow_overlap": allow_overlap}
        _show_plan(reference, candidate, yardstick, as_json, **pairing)
        return
    if out is None:
        raise UsageError("Give --out, the directory for evaluation.json and units.jsonl.")
    common: dict[str, Any] = {
        "format": format, "gate": gate, "allow_missing": allow_missing,
        "resamples": bootstrap, "seed": seed, "dimensions": wanted,
    }  # fmt: skip
    if import_vbench is not None and without_runs:
        from ptq.evaluation import evaluate_imported

        if format is None:
            raise UsageError("Result files do not say which format they are of: pass --format hif4 or --format mxfp4.")
        chosen = "icme2026" if suite == "core" else suite
        ui.info(f"Comparing the scores of {import_vbench[0]} and {import_vbench[1]}.")
        evaluation = evaluate_imported(import_vbench[0], import_vbench[1], out, suite=chosen, **common)
    elif reference is not None and candidate is not None:
        from ptq.evaluation import VBenchSettings, evaluate_runs

        ui.info(f"Comparing {candidate} with {reference}, suite {suite}.")
        vbench = VBenchSettings(vbench_python, vbench_root, vbench_device) if vbench_python else None
        evaluation = evaluate_runs(
            reference, candidate, out, suite=suite, stride=stride, fresh=fresh,
            import_vbench=import_vbench, vbench=vbench, allow_differences=differences, allow_overlap=allow_overlap,
            yardstick=yardstick, **common,
        )  # fmt: skip
    _show(evaluation, out, as_json)


def _show(evaluation: Evaluation, out: Path, as_json: bool) -> None:
    from ptq.evaluation.statistics import AGGREGATES
    from ptq.report.cells import percent
    from ptq.report.tables import evaluation_tables

    if as_json:
        print_json(evaluation.as_json())
        return
    if evaluation.verdict is not None and evaluation.gate is not None and evaluation.limit is not None:
        loss = f"{AGGREGATES[evaluation.gate]} {percent(evaluation.deciding).text}"
        ui.say(
            f"  {loss}, limit {100 * evaluation.limit:.1f} % ({evaluation.format}), suite {evaluation.suite}, {evaluation.prompts} prompts, {evaluation.units} videos a run",
            evaluation.verdict,
            _VERDICT_STYLE[evaluation.verdict],
        )
    show_tables(evaluation_tables(evaluation))
    for warning in evaluation.warnings:
        ui.warn(warning)
    ui.info(f"Written to {out / 'evaluation.json'} and {out / 'units.jsonl'}.")


def _show_plan(
    reference: Path | None, candidate: Path | None, yardstick: Path | None, as_json: bool, **pairing: Any
) -> None:
    from ptq.evaluation import plan

    if reference is None or candidate is None:
        raise UsageError("--dry-run plans the measuring of two runs; it needs --reference and --candidate.")
    content = plan(reference, candidate, **pairing)
    if yardstick is not None:
        further = plan(reference, yardstick, **{**pairing, "allow_overlap": True})
        content.update({name: content[name] + further[name] for name in ("seconds", "disk_bytes")})
    if as_json:
        print_json(content)
        return
    ui.info(
        f"{content['units']} pairs, {content['excluded']} units left out. The built-in measures take about {ui.format_seconds(content['seconds'])}, {ui.format_bytes(content['memory_bytes'])} of memory and {ui.format_bytes(content['disk_bytes'])} on disk."
    )


def _show_weights(
    suite: str, dimensions: list[str] | None, python: Path | None, root: Path | None, as_json: bool
) -> None:
    from ptq.evaluation.vbench.check import take_inventory

    found = take_inventory(suite, dimensions, python, root)
    if as_json:
        rows = [{**vars(weight), "path": str(weight.path)} for weight in found.weights]
        print_json({"cache": str(found.cache), "weights": rows, "hub": found.elsewhere})
        return
    for weight in found.weights:
        state = "present" if weight.present else f"missing\n    from {weight.source}"
        ui.say(f"{weight.dimension}: {weight.path} {state}")
    for name, what in found.elsewhere.items():
        ui.info(f"{name} also needs {what}; this cannot be checked here.")
