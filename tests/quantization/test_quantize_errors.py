"""Held-out error, sweep and block choice: three ways to the same number, and choices that really help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from held_out import denoiser_errors, sweep
from quantization_helpers import FULL, make_settings, run

from ptq.calibration.run import CalibrationPlan, calibrate
from ptq.checkpoint.manifest import read_manifest
from ptq.errors import UsageError
from ptq.prompts import Sample
from ptq.rules import RULES
from ptq.store.calibration import CalibrationSet
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline


@pytest.fixture(scope="module")
def held_out(model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    """Records of other prompts; their names are those of the calibration records."""
    info = CalibrationSet(records).info
    layout = read_layout(model)
    preset = layout.preset.model_validate(info.preset)
    samples = [Sample("held", f"h{i}", f"two dogs run on the beach {i}", f"dogs {i}") for i in range(2)]
    out = tmp_path_factory.mktemp("held") / "records"
    plan = CalibrationPlan(layout, preset, samples, 4, 0, {"name": "h.txt", "sha256": "1" * 64})
    calibrate(plan, lambda: load_pipeline(model), out)
    return CalibrationSet(out)


def test_a_sweep_measures_what_full_runs_of_its_recipes_would(model, records, held_out, tmp_path):
    variants = {"rtn": make_settings("hif4"), "full": make_settings("hif4", *FULL)}
    rows = sweep(read_layout(model), CalibrationSet(records), held_out, variants)
    for row in rows:
        out = tmp_path / row.name
        run(model, records, out, variants[row.name])
        expected = denoiser_errors(read_layout(model), read_layout(out), held_out)
        assert row.errors == pytest.approx({name: expected[name] for name in row.errors}, rel=1e-9)
    assert rows[1].error < rows[0].error


def test_the_denoiser_error_in_the_manifest_is_that_of_the_checkpoint(model, records, tmp_path):
    run(model, records, tmp_path / "out", make_settings("hif4", "records.for_report=1000"))
    packed = read_layout(tmp_path / "out")
    expected = denoiser_errors(read_layout(model), packed, CalibrationSet(records))
    found = {entry.expert: entry.denoiser_error for entry in read_manifest(packed.path).experts}
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-9)


def test_a_sweep_refuses_what_it_could_not_measure(model, records):
    calibration = CalibrationSet(records)
    with pytest.raises(UsageError, match="both record sets"):
        sweep(read_layout(model), calibration, calibration, {"rtn": make_settings("hif4")})
    unequal = {"a": make_settings("hif4"), "b": make_settings("hif4", "records.tokens_per_record=3")}
    with pytest.raises(UsageError, match="equal `records` keys"):
        sweep(read_layout(model), calibration, calibration, unequal)
    for key in ("solver.tune=true", "solver.residual=0.1"):
        with pytest.raises(UsageError, match=r"neither tunes .* which more asks for"):
            sweep(read_layout(model), calibration, calibration, {"more": make_settings("hif4", *FULL, key)})


@pytest.mark.parametrize("name", ["hif4", "mxfp4"])
def test_chosen_blocks_beat_priors_and_no_choice(model, records, tmp_path, name):
    manifest = run(model, records, tmp_path / "out", make_settings(name, auto_protect=True))
    table = json.loads((tmp_path / "out/ptq_sensitivity.json").read_text())
    comparison = table["comparison"]
    assert 1 <= len(manifest.high_precision) <= RULES[name].blocks
    assert all(comparison["auto"] <= value for value in comparison.values())
    assert comparison["auto"] < comparison["none"]
    after = [pick["after"] for pick in table["picks"]]
    assert after == sorted(after, reverse=True) and after[-1] == pytest.approx(comparison["auto"])
    assert {f"{p['expert']}:{p['block']}" for p in table["picks"]} == set(manifest.high_precision)
    assert all(row.reason for row in manifest.blocks if row.high_precision)


def test_outlier_planting_keeps_the_function_and_plants_outliers(model, tmp_path):
    import torch

    from ptq.wan.outliers import FACTORS, make_outlier_pipeline

    planted = load_pipeline(make_outlier_pipeline(read_layout(model), tmp_path / "planted"))
    original = load_pipeline(model)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((1, 16, 3, 8, 8), (1, 16, 64))]
    for expert in ("transformer", "transformer_2"):
        seen: dict[str, torch.Tensor] = {}
        pair = [getattr(pipe, expert) for pipe in (original, planted)]
        for label, module in zip(("original", "planted"), pair, strict=True):
            for layer in ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj"):
                key = f"{label} {layer}"
                target = module.blocks[1].get_submodule(layer)
                target.register_forward_pre_hook(
                    lambda _, x, key=key, seen=seen: seen.update({key: x[0].abs().amax((0, 1))})
                )
        with torch.no_grad():
            outputs = [m(inputs[0], torch.tensor([700.0]), inputs[1], return_dict=False)[0] for m in pair]
        assert (outputs[1] - outputs[0]).norm() < 1e-3 * outputs[0].norm()
        for layer in ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj"):
            ratio = seen[f"planted {layer}"] / seen[f"original {layer}"]
            factors = ratio[ratio > 2]
            assert len(factors) == 4 and FACTORS[0] * 0.9 < factors.min() <= factors.max() < FACTORS[-1] * 1.1
