"""Tables about the checkpoint and the runs: size, coverage, errors, protection, settings, hashes, environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptq.checkpoint.manifest import LayerEntry, Manifest
from ptq.report.cells import Cell, Table, count, error, flatten, number, plain, share, size
from ptq.report.facts import ROLES, Facts
from ptq.rules import block_budget
from ptq.store.calibration import CalibrationInfo
from ptq.store.evaluation import FILE as EVALUATION_FILE
from ptq.store.evaluation_units import FILE as UNITS_FILE
from ptq.store.files import sha256_file
from ptq.store.sensitivity import SensitivityTable
from ptq.wan.variants import EXPERTS

SHOWN_LAYERS = 10
LAYER_COLUMNS = ("output error", "plain rounding", "weight SQNR (dB)")
_ROLE_NAMES = {"reference": "original", "candidate": "quantized"}


def checkpoint_tables(facts: Facts) -> Iterable[Table]:
    """Tables of the checkpoint, in reading order; none without a checkpoint."""
    manifest = facts.manifest
    if manifest is None or facts.checkpoint is None:
        return
    yield _size(manifest, facts.checkpoint)
    yield _experts(manifest)
    yield _layer_kinds(manifest)
    yield _worst_layers(manifest)
    yield _blocks(manifest)
    if facts.sensitivity is not None:
        yield _choices(facts.sensitivity)
        yield _picks(facts.sensitivity)


def provenance_tables(facts: Facts) -> Iterable[Table]:
    """How it was made: recipe, generation settings, runs, environment, hashes."""
    if facts.manifest is not None:
        recipe = flatten(facts.manifest.recipe.model_dump(mode="json", exclude={"description", "format"}))
        title = f"Recipe {facts.manifest.recipe_name}, as resolved"
        yield Table.of("recipe", title, ("key", "value"), recipe.items())
    if facts.ablation is not None:
        rows = [[_ablation_cell(value) for value in row] for row in facts.ablation.rows]
        yield Table.of("ablation", facts.ablation.title, facts.ablation.columns, rows, facts.ablation.note)
    yield from _settings(facts)
    if facts.calibration is not None:
        yield Table.of("calibration", "Calibration", ("setting", "value"), _calibration(facts.calibration))
    if any(facts.runs.values()):
        yield _runs(facts)
    if facts.evaluation.vbench is not None:
        yield _vbench(facts.evaluation.vbench)
    yield _versions(facts)
    yield _hashes(facts)


def _settings(facts: Facts) -> Iterable[Table]:
    """Settings of the generation runs: one column where they are the same, else one a run."""
    sides = [flatten(getattr(facts.evaluation, role).settings or {}) for role in ROLES]
    ours, theirs = (side or other for side, other in zip(sides, reversed(sides), strict=True))
    if ours == theirs:
        if ours:
            yield Table.of("settings", "Generation, both runs", ("setting", "value"), ours.items())
        return
    rows = [(name, *(side.get(name, "default") for side in (ours, theirs))) for name in {**ours, **theirs}]
    yield Table.of("settings", "Generation", ("setting", *_ROLE_NAMES.values()), rows)


def size_rows(manifest: Manifest) -> dict[str, Cell]:
    """Size, coverage and cost, as the report and `ptq compare` name them."""
    coverage = manifest.coverage
    return {
        "quantized weight values": count(coverage.quantized_parameters),
        "share of Linear parameters in W4A4": share(coverage.parameter_share),
        "share of Linear FLOPs in W4A4": share(coverage.flop_share),
        "products of residual blocks, of those without": share(coverage.residual_share),
        "bits per quantized value, scales included": number(coverage.bits_per_quantized_value),
        "these values in bfloat16": size(2 * coverage.quantized_parameters),
        "these values packed": size(coverage.quantized_bytes),
        "smoothing vectors or learned blocks beside them": size(coverage.basis_bytes),
        "transformers, original weight files": size(coverage.original_bytes),
        "quantization took": Cell(f"{manifest.seconds:.0f} s", (manifest.seconds,)),
        "peak memory": size(manifest.peak_memory_bytes),
    }


def _size(manifest: Manifest, checkpoint: Path) -> Table:
    weights = [name for name in manifest.files if name.endswith(".safetensors") and name.partition("/")[0] in EXPERTS]
    on_disk = sum((checkpoint / name).stat().st_size for name in weights if (checkpoint / name).is_file())
    budget = block_budget(manifest.format)
    scope = "in each expert" if manifest.budget_scope == "per-expert" else "in total"
    rows: list[tuple[str, Cell | str]] = [
        *size_rows(manifest).items(),
        ("transformers, packed weight files", size(on_disk)),
        ("blocks kept in high precision", ", ".join(manifest.high_precision) or "none"),
        ("allowed by the rules", "any: no rule for this format" if budget is None else f"{budget} {scope}"),
    ]
    return Table.of("size", "Size and coverage", ("", "value"), rows)


def _experts(manifest: Manifest) -> Table:
    rows = [(row.expert, error(row.denoiser_error), count(row.records)) for row in manifest.experts]
    note = "Squared error of the predicted velocity on calibration records, relative to the original's output."
    return Table.of("experts", "Denoiser output error", ("expert", "relative error", "records"), rows, note)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def layers_by_kind(manifest: Manifest) -> dict[str, list[LayerEntry]]:
    """The layers of one name over all blocks and experts."""
    groups: dict[str, list[LayerEntry]] = {}
    for row in manifest.layers:
        groups.setdefault(row.layer, []).append(row)
    return groups


def _layer_kinds(manifest: Manifest) -> Table:
    rows = []
    for name, layers in layers_by_kind(manifest).items():
        sqnr = [row.weight_sqnr_db for row in layers if row.weight_sqnr_db is not None]
        rows.append((
            name,
            count(len(layers)),
            error(mean([row.output_error for row in layers])),
            error(mean([row.output_error_rtn for row in layers])),
            number(mean(sqnr) if sqnr else None, 3),
        ))  # fmt: skip
    note = "Mean over the blocks of relative squared output errors with quantized inputs; plain rounding in the same basis."
    return Table.of("kinds", "Errors by kind of layer", ("layer", "layers", *LAYER_COLUMNS), rows, note)


def _worst_layers(manifest: Manifest) -> Table:
    worst = sorted(manifest.layers, key=lambda row: (-row.output_error, row.expert, row.block, row.layer))[
        :SHOWN_LAYERS
    ]
    rows = [
        (
            f"{row.expert}.blocks.{row.block}.{row.layer}",
            error(row.output_error),
            error(row.output_error_rtn),
            Cell("exact") if row.weight_sqnr_db is None else number(row.weight_sqnr_db, 3),
        )
        for row in worst
    ]
    return Table.of("worst-layers", f"The {len(rows)} layers with the largest error", ("layer", *LAYER_COLUMNS), rows)


def _blocks(manifest: Manifest) -> Table:
    rows = [
        (
            f"{row.expert}:{row.block}",
            error(row.stream_error),
            "high precision" if row.high_precision else "W4A4",
            row.reason or "",
        )
        for row in manifest.blocks
    ]
    note = "Squared error of the hidden states after the block, all earlier blocks quantized too."
    return Table.of("blocks", "Error after each block", ("block", "stream error", "precision", "why"), rows, note)


def _choices(sensitivity: SensitivityTable) -> Table:
    rows = [(name, error(value)) for name, value in sensitivity.comparison.items()]
    return Table.of("choices", "Which blocks to protect: error of each choice", ("choice", "denoiser error"), rows)


def _picks(sensitivity: SensitivityTable) -> Table:
    rows = [(f"{pick.expert}:{pick.block}", error(pick.before), error(pick.after)) for pick in sensitivity.picks]
    note = "" if rows else "No block was worth protecting."
    return Table.of(
        "picks", "Protected blocks, in the order chosen", ("block", "error before", "error after"), rows, note
    )


def _ablation_cell(value: str | int | float) -> Cell:
    return Cell(value) if isinstance(value, str) else Cell(plain(value, 6), (float(value),))


def _calibration(calibration: CalibrationInfo) -> list[tuple[str, str]]:
    preset = calibration.preset
    return [
        ("prompts", f"{len(calibration.samples)} of {calibration.prompts['name']}"),
        ("records per prompt", str(calibration.records_per_prompt)),
        ("video", f"{preset['width']} x {preset['height']}, {preset['num_frames']} frames, {preset['steps']} steps"),
        ("seed", str(calibration.seed)),
    ]


def _runs(facts: Facts) -> Table:
    rows = []
    for role in ROLES:
        run = facts.runs.get(role)
        if run is None:
            continue
        lines = [unit.line for unit in run.units.values()]
        seconds = [line.seconds for line in lines if line.seconds is not None]
        memory = [line.peak_memory_bytes for line in lines if line.peak_memory_bytes is not None]
        devices = sorted({line.device for line in lines if line.device})
        rows.append((
            _ROLE_NAMES[role],
            count(len(lines)),
            ", ".join(devices) or "not recorded",
            number(mean(seconds) if seconds else None, 3),
            size(max(memory)) if memory else Cell("not recorded"),
        ))  # fmt: skip
    columns = ("run", "videos", "device", "seconds a video", "peak memory")
    return Table.of("runs", "Generation runs", columns, rows)


def _vbench(details: Mapping[str, Any]) -> Table:
    """Where the scores came from: result files with their digests, or the installation that made them."""
    rows = [(file["path"], file["sha256"]) for file in details.get("files", ())]
    rest = {key: value for key, value in details.items() if key in ("installation", "mode")}
    return Table.of("vbench", "VBench", ("", "value"), [*rows, *flatten(rest).items()])


def _versions(facts: Facts) -> Table:
    columns: dict[str, dict[str, str]] = {}
    if facts.manifest is not None:
        columns["quantization"] = facts.manifest.versions
    for role in ROLES:
        versions = getattr(facts.evaluation, role).versions
        if versions:
            columns[f"{_ROLE_NAMES[role]} run"] = {
                ("wan-ptq" if k == "ptq" else k): str(v) for k, v in versions.items()
            }
    columns["evaluation"] = {"wan-ptq": facts.evaluation.ptq_version}
    names = sorted({name for versions in columns.values() for name in versions})
    rows = [(name, *(versions.get(name, "") for versions in columns.values())) for name in names]
    return Table.of("versions", "Versions", ("package", *columns), rows)


def _hashes(facts: Facts) -> Table:
    rows = [
        (name, sha256_file(facts.directory / name))
        for name in (EVALUATION_FILE, UNITS_FILE)
        if (facts.directory / name).is_file()
    ]
    for role in ROLES:
        info = getattr(facts.evaluation, role)
        if info.checkpoint_digest:
            rows.append((f"weights of the {_ROLE_NAMES[role]} run", info.checkpoint_digest))
        if info.run_digest:
            rows.append((f"settings of the {_ROLE_NAMES[role]} run", info.run_digest))
    if facts.evaluation.yardstick is not None:
        info = facts.evaluation.yardstick.run
        rows += [
            ("weights of the yardstick run", str(info.checkpoint_digest)),
            ("settings of the yardstick run", str(info.run_digest)),
        ]
    if facts.manifest is not None:
        rows.append(("checkpoint, all files", facts.manifest.digest))
        rows.append(("quantization run (model, records, recipe, versions)", facts.manifest.signature))
        if facts.manifest.calibration:
            rows.append(("calibration records", facts.manifest.calibration["digest"]))
            prompts = facts.manifest.calibration["prompts"]
            rows.append((f"calibration prompts, {prompts['name']}", prompts["sha256"]))
    run = facts.runs.get("candidate")
    prompts = (run.info.plan.prompts or {}) if run else {}
    if prompts.get("file") and prompts.get("sha256"):
        rows.append((f"evaluation prompts, {Path(prompts['file']).name}", prompts["sha256"]))
    return Table.of("hashes", "Hashes (SHA-256)", ("of", "digest"), rows)
