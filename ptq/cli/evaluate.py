"""`ptq evaluate`: parse, measure, show. The verdict comes first; every number shown is one of evaluation.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

_VERDICT_STYLE = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}


def evaluate(
    reference: Annotated[
        Path | None, typer.Option(help="Generation directory of the original model (with --vbench-check: not needed).")
    ] = None,
    candidate: Annotated[Path | None, typer.Option(help="Generation directory of the quantized model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where evaluation.json and units.jsonl go.")] = None,
    suite: Annotated[str, typer.Option(help="core, tiny, icme2026, vbench-i2v or vbench.")] = "core",
    format: Annotated[
        str | None, typer.Option(help="hif4 (limit 0.5 %) or mxfp4 (1 %); by default what the candidate was made with.")
    ] = None,
    gate: Annotated[
        str, typer.Option(help="The deciding average: mean_signed, mean_absolute, mean_positive or mean_score.")
    ] = "mean_signed",
    allow_missing: Annotated[bool, typer.Option(help="Use the units both runs have, and list the others.")] = False,
    stride: Annotated[int, typer.Option(help="Take SSIM, sharpness and saturation on every N-th frame.")] = 1,
    bootstrap: Annotated[int, typer.Option(help="Bootstrap resamples of the intervals.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    dimensions: Annotated[
        str | None, typer.Option(help="Only these dimensions of a VBench suite, separated by commas.")
    ] = None,
    import_vbench: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="Two *_eval_results.json, reference and candidate; works without --reference and --candidate."
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
    fresh: Annotated[bool, typer.Option(help="Measure again instead of continuing in --out.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check the runs and print the plan, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation.json instead of tables.")] = False,
) -> None:
    """Compare videos of the quantized model with the original's, and judge the loss.

    The exit code is 0 when the comparison was made, whatever the verdict.

    Example: ptq evaluate --reference runs/bf16 --candidate runs/hif4 --out runs/eval --suite icme2026 --vbench-python
    ~/vbench/bin/python
    """
    from ptq.errors import UsageError

    wanted = [name.strip() for name in dimensions.split(",") if name.strip()] if dimensions else None
    if vbench_check:
        _show_weights(suite, wanted, vbench_python, vbench_root, as_json)
        return
    if vbench_root is not None and vbench_python is None:
        raise UsageError("--vbench-root needs --vbench-python, the interpreter that has VBench's dependencies.")
    if (reference is None) != (candidate is None) or (reference is None and import_vbench is None):
        raise UsageError("Give both --reference and --candidate, or --import-vbench with two result files.")
    if dry_run:
        _show_plan(reference, candidate, allow_missing, as_json)
        return
    if out is None:
        raise UsageError("Give --out, the directory for evaluation.json and units.jsonl.")
    common: dict[str, Any] = {
        "format": format, "gate": gate, "allow_missing": allow_missing,
        "resamples": bootstrap, "seed": seed, "dimensions": wanted,
    }  # fmt: skip
    if reference is not None and candidate is not None:
        from ptq.evaluation import VBenchSettings, evaluate_runs

        vbench = VBenchSettings(vbench_python, vbench_root, vbench_device) if vbench_python else None
        content = evaluate_runs(
            reference, candidate, out, suite=suite, stride=stride, fresh=fresh,
            import_vbench=import_vbench, vbench=vbench, **common,
        )  # fmt: skip
    else:
        from ptq.evaluation import evaluate_imported

        assert import_vbench is not None
        content = evaluate_imported(*import_vbench, out, suite="icme2026" if suite == "core" else suite, **common)
    _show(content, out, as_json)


def _show(content: dict[str, Any], out: Path, as_json: bool) -> None:
    from ptq import ui

    if as_json:
        ui.console.print_json(json.dumps(content))
        return
    if content["verdict"]:
        _show_verdict(content)
        _show_gate(content)
    if "informative" in content:
        _show_measures(content)
    for warning in content["warnings"]:
        ui.warn(warning)
    for note in content.get("notes", ()):
        ui.info(note)
    ui.info(f"Written to {out / 'evaluation.json'} and {out / 'units.jsonl'}.")


def _show_verdict(content: dict[str, Any]) -> None:
    from rich.markup import escape

    from ptq import ui
    from ptq.evaluation.statistics import AGGREGATES

    value = content["aggregates"].get(content["gate"])
    shown = f"{_percent(value['value'])} {_interval(value)}" if value else "undefined"
    verdict = content["verdict"]
    ui.console.print(
        f"[{_VERDICT_STYLE[verdict]}]{verdict}[/]  {AGGREGATES[content['gate']]} "
        f"{escape(shown)}, limit "
        f"{content['limit']:.1%} ({content['format']}), {content['prompts']} prompts, {content['units']} videos a run",
        soft_wrap=True,
    )


def _show_gate(content: dict[str, Any]) -> None:
    from ptq import ui
    from ptq.evaluation.statistics import AGGREGATES

    rows = [
        (
            name, f"{d['reference']:.4f}", f"{d['candidate']:.4f}", f"{d['points']['value']:+.2f}",
            _percent(d["relative_loss"]["value"]) if d["relative_loss"] else "-",
            _interval(d["relative_loss"]), d["units"],
        )
        for name, d in content["dimensions"].items()
    ]  # fmt: skip
    ui.table(
        f"Loss by dimension, suite {content['suite']} (positive: the candidate is worse)",
        ("dimension", "reference", "candidate", "points", "relative loss", "95 % interval", "videos"),
        rows,
    )
    ui.table(
        "Averages over the dimensions",
        ("average", "loss", "95 % interval"),
        [(AGGREGATES[key], _percent(value["value"]), _interval(value)) for key, value in content["aggregates"].items()],
    )
    totals = (content.get("vbench") or {}).get("totals")
    if totals:
        ui.table(
            "VBench totals",
            ("score", "reference", "candidate"),
            [
                (name, f"{totals['reference'][name]:.4f}", f"{totals['candidate'][name]:.4f}")
                for name in totals["reference"]
            ],
        )


def _show_measures(content: dict[str, Any]) -> None:
    from ptq import ui
    from ptq.evaluation.suites import PAIRED_MEASURES, RUN_DIMENSIONS

    ui.table(
        "Beside the gate: measures of each run",
        ("measure", "reference", "candidate", "relative change", "95 % interval"),
        [
            (
                RUN_DIMENSIONS.get(name, name), f"{d['reference']:.4g}", f"{d['candidate']:.4g}",
                _percent(-d["relative_loss"]["value"]) if d["relative_loss"] else "-",
                _interval(d["relative_loss"], negate=True),
            )
            for name, d in content["informative"].items()
        ],
    )  # fmt: skip
    sources = ", ".join(f"{count} from {source}" for source, count in sorted(content["sources"].items()))
    ui.table(
        f"Drift between the paired videos ({sources})",
        ("measure", "mean", "lowest", "highest", "videos"),
        [
            (PAIRED_MEASURES[name], f"{v['mean']:.4g}", f"{v['min']:.4g}", f"{v['max']:.4g}", v["units"])
            for name, v in content["paired"].items()
        ],
    )


def _percent(value: float) -> str:
    return f"{100 * value:+.2f} %"


def _interval(value: dict[str, Any] | None, *, negate: bool = False) -> str:
    if value is None or value["low"] is None:
        return "-"
    low, high = (-value["high"], -value["low"]) if negate else (value["low"], value["high"])
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]"


def _show_plan(reference: Path | None, candidate: Path | None, allow_missing: bool, as_json: bool) -> None:
    from ptq import ui
    from ptq.errors import UsageError
    from ptq.evaluation import plan
    from ptq.ui.progress import format_seconds

    if reference is None or candidate is None:
        raise UsageError("--dry-run plans the measuring of two runs; it needs --reference and --candidate.")
    content = plan(reference, candidate, allow_missing=allow_missing)
    if as_json:
        ui.console.print_json(json.dumps(content))
        return
    ui.info(
        f"{content['units']} pairs, {content['excluded']} units left out; about "
        f"{format_seconds(content['seconds'])} for the "
        f"built-in measures, {content['memory_bytes'] / 1e6:.0f} MB of memory, {content['disk_bytes'] / 1e6:.1f} "
        "MB on disk."
    )


def _show_weights(
    suite: str, dimensions: list[str] | None, python: Path | None, root: Path | None, as_json: bool
) -> None:
    from ptq import ui
    from ptq.evaluation import vbench_check as check
    from ptq.evaluation.suites import get_suite

    names = dimensions or get_suite("vbench" if suite in ("core", "tiny") else suite).gate
    cache = check.probe(python, root).cache if python else check.default_cache()
    weights = check.required_weights(names, cache)
    if as_json:
        rows = [{**vars(weight), "path": str(weight.path)} for weight in weights]
        ui.console.print_json(json.dumps({"cache": str(cache), "weights": rows, "hub": check.fetched_elsewhere(names)}))
        return
    for weight in weights:
        ui.console.print(
            f"{weight.dimension}: {weight.path} [{'green]present' if weight.present else 'yellow]missing'}[/]"
            + ("" if weight.present else f"\n    from {weight.source}"),
            soft_wrap=True,
        )
    for name, what in check.fetched_elsewhere(names).items():
        ui.info(f"{name} also needs {what}; this cannot be checked here.")
