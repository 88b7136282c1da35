"""`ptq quantize`: from a model and its calibration records to a packed 4-bit checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptq import ui
from ptq.cli import options
from ptq.cli.common import default_device, describe_out, print_json, quiet_libraries

if TYPE_CHECKING:
    from ptq.checkpoint.manifest import Manifest


def quantize(
    model: options.Model,
    calibration: Annotated[Path, typer.Option("--calibration", help="Directory written by `ptq calibrate`.")],
    format_name: Annotated[str, options.format_option("hif4 or mxfp4.")],
    out: Annotated[Path, options.NEW_OUT],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe name or YAML file [default: the format's].")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated."),
    ] = None,
    high_precision: Annotated[
        str, typer.Option("--high-precision", help="none, auto, or transformer:0,transformer_2:39")
    ] = "none",
    budget_scope: Annotated[str, typer.Option("--budget-scope", help="total or per-expert")] = "total",
    seed: Annotated[int, options.seed("Of token subsamples.")] = 0,
    device: options.Device = None,
    max_memory: Annotated[
        float | None, options.number("--max-memory", 0.0, 1e6, "GB for hidden states; more goes to disk.")
    ] = None,
    streams: Annotated[
        str,
        typer.Option(
            "--streams", help="Place of the hidden states: auto, gpu, pinned or disk; on a CPU auto, memory or disk."
        ),
    ] = "auto",
    link: Annotated[bool, typer.Option("--link", help="Link unchanged components instead of copying them.")] = False,
    fresh: options.Fresh = False,
    check: options.Preflight = True,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Quantize the block Linears of every expert to 4 bits and write a checkpoint that diffusers loads.

    Example: ptq quantize tiny --calibration calibration --format hif4 --out tiny-hif4
    """
    from ptq.config import load_recipe
    from ptq.config.overrides import name_with
    from ptq.quantization.settings import QuantizeSettings, parse_high_precision, parse_scope
    from ptq.quantization.workdir import WorkDir, refuse_taken, unfinished
    from ptq.store.calibration import CalibrationSet
    from ptq.wan.loading import find_model

    scope = parse_scope(budget_scope)
    refuse_taken(out)
    layout = find_model(model)
    name, changes = recipe or format_name, tuple(overrides or ())
    settings = QuantizeSettings(
        format=format_name,
        recipe=load_recipe(name, format_name, changes),
        recipe_name=name_with(name, changes),
        high_precision=parse_high_precision(high_precision, {e: layout.num_blocks(e) for e in layout.experts}),
        auto_protect=high_precision == "auto",
        budget_scope=scope,
        seed=seed,
    )
    limit = None if max_memory is None else int(max_memory * 1e9)
    records = CalibrationSet(calibration)
    ui.info(
        f"{'Planning to quantize' if dry_run else 'Quantizing'} {model} to {format_name} with the records of {calibration}."
    )

    from ptq.quantization.job import Job, QuantizeOptions
    from ptq.quantization.placing import parse_streams
    from ptq.quantization.plan import describe, needs
    from ptq.quantization.run import quantize as run
    from ptq.wan.check import check_model
    from ptq.wan.preflight import preflight

    quiet_libraries()
    check_model(layout)
    device = device or default_device()
    place = parse_streams(streams, device)
    how = QuantizeOptions(device=device, max_memory=limit, streams=place, link=link, fresh=fresh)
    job = Job(layout, records, settings, out, how)
    job.check()
    WorkDir(out, job.signature).refuse_other(job.signature, fresh=fresh)  # before the machine is looked at
    if dry_run:
        ui.details("Quantization plan", {**describe(job), "directory": describe_out(out, unfinished(out), fresh=fresh)})
        return
    if check:
        preflight(lambda: needs(job), out, device, format_name)
    manifest = run(job)
    if as_json:
        print_json(summary(manifest))
    else:
        ui.details(f"{out}", summary(manifest))


def summary(manifest: Manifest) -> dict[str, object]:
    """The few facts shown after quantizing and by inspect."""
    coverage = manifest.coverage
    tuned = [row.tuning.kept for row in manifest.blocks if row.tuning is not None]
    errors = {f"denoiser error, {e.expert}": f"{e.denoiser_error:.3e} on {e.records} records" for e in manifest.experts}
    return {
        "format": manifest.format,
        "recipe": manifest.recipe_name,
        "bits per quantized value": coverage.bits_per_quantized_value,
        "with smoothing or learned blocks": round(coverage.bits_with_basis, 2),
        "W4A4 share of Linear parameters": f"{coverage.parameter_share:.2%}",
        "W4A4 share of Linear FLOPs": f"{coverage.flop_share:.2%}",
        **({"residual blocks": f"{coverage.residual_share:.2%} more products"} if coverage.residual_share else {}),
        **({"tuned blocks": f"{sum(tuned)} of {len(tuned)} kept their tuned codes"} if tuned else {}),
        "high-precision blocks": ", ".join(manifest.high_precision) or "none",
        **errors,
        "seconds": round(manifest.seconds, 1),
        "peak memory": f"{manifest.peak_memory_bytes / 1e9:.2f} GB",
    }
