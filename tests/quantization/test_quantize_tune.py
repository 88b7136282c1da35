"""Codes tuned on a block's output: gradients, what decides, what stays, resumed as every run, too few records refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantization_helpers import LEARNED, file_digests, make_records, make_settings, manifest_facts, run
from torch import Tensor, nn

from ptq.checkpoint.manifest import read_manifest
from ptq.checkpoint.shards import ShardSet
from ptq.cli.quantize import summary
from ptq.config.recipe import SolverSettings
from ptq.config.tuning import TuneSettings
from ptq.errors import UsageError
from ptq.quantization import expert as expert_module
from ptq.quantization.job import Job
from ptq.quantization.latent import LatentLinear, SharedInput
from ptq.quantization.module import quantize_module
from ptq.quantization.plan import describe, seconds
from ptq.quantization.probe import Rates
from ptq.quantization.tune import split
from ptq.report.method import describe_method
from ptq.runtime import QuantLinear
from ptq.scheme import Scheme
from ptq.solvers.solve import solve_group
from ptq.solvers.stats import InputStats
from ptq.store.calibration import CalibrationSet
from ptq.store.records import Record
from ptq.wan.layout import read_layout
from ptq.wan.replay import ExpertReplay, run_block

PLAIN, TUNED = (make_settings("hif4", *LEARNED, *more) for more in ((), ("solver.tune={steps: 8, lr: 0.01}",)))


@pytest.fixture(scope="module")
def records(single, tmp_path_factory) -> CalibrationSet:
    """Enough tokens for what is learned from three prompts to help with a fourth."""
    return make_records(single, tmp_path_factory.mktemp("records"), prompts=4, height=128, width=128)


@pytest.fixture(scope="module")
def made(single, records, tmp_path_factory) -> dict[str, Path]:
    """The same checkpoint as solved, and tuned."""
    root = tmp_path_factory.mktemp("made")
    run(single, records.directory, root / "plain", PLAIN)
    run(single, records.directory, root / "tuned", TUNED)
    return {name: root / name for name in ("plain", "tuned")}


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    shards = ShardSet(checkpoint / "transformer")
    return {name: shards.read(name) for name in shards.entries}


def first_block_error(model: Path, checkpoint: Path, records: CalibrationSet, prompt: str) -> float:
    """Of a checkpoint's first block on one prompt's records: squared error relative to the original's output."""
    error = signal = 0.0
    replays = [
        ExpertReplay(ShardSet(p / "transformer"), read_layout(p).experts["transformer"]) for p in (model, checkpoint)
    ]
    original, quantized = (replay.load_block(0) for replay in replays)
    for record in records:
        if record.sample_id == prompt:
            hidden, context = replays[0].head(record.record, records.load(record))
            expected = run_block(original, hidden, context)
            error += float((run_block(quantized, hidden, context) - expected).double().square().sum())
            signal += float(expected.double().square().sum())
    return error / signal


def test_only_elements_change_and_held_out_records_improve(made, single, records):
    plain, tuned = (tensors(made[name]) for name in ("plain", "tuned"))
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert changed == {name for name in plain if name.endswith(".weight_packed")}
    rows = [row.tuning for row in read_manifest(made["tuned"]).blocks]
    assert [(row.records, row.held_out, row.kept) for row in rows] == [(12, 4, True)] * 2
    for name, claimed in (("plain", rows[0].before), ("tuned", rows[0].after)):
        found = first_block_error(single, made[name], records, "p3")
        assert found == pytest.approx(claimed, rel=1e-4)
    assert rows[0].after < 0.99 * rows[0].before
    (text,) = [step.text for step in describe_method(read_manifest(made["tuned"])) if "tuned" in step.title]
    assert "8 steps of Adam" in text and "2 of 2 blocks kept them" in text and "on 4 held-out records" in text
    assert TUNED.recipe.solver.tune.describe() in (made["tuned"] / "README.md").read_text()
    manifests = [read_manifest(made[name]) for name in ("plain", "tuned")]
    assert manifests[0].layers == manifests[1].layers  # errors of single layers are from before
    shown = [summary(manifest).get("tuned blocks") for manifest in manifests]
    assert shown == [None, "2 of 2 kept their tuned codes"]


def test_without_a_gain_on_held_out_records_codes_stay(single, single_records, tmp_path):
    """Eight records of four tokens teach nothing that holds elsewhere."""
    settings = make_settings("hif4", *LEARNED, "solver.tune={steps: 6, lr: 0.03}")
    manifest = run(single, single_records, tmp_path / "tuned", settings)
    run(single, single_records, tmp_path / "plain", PLAIN)
    assert all(row.tuning is not None and not row.tuning.kept for row in manifest.blocks)
    (text,) = [step.text for step in describe_method(manifest) if "tuned" in step.title]
    assert "None of 2 blocks kept them" in text and "0.0%" not in text
    weights = [name for name in file_digests(tmp_path / "plain") if name.endswith(".safetensors")]
    assert all(file_digests(tmp_path / "plain")[name] == file_digests(tmp_path / "tuned")[name] for name in weights)


def test_a_stopped_run_goes_on_with_the_same_codes(made, single, records, tmp_path, monkeypatch):
    put = expert_module.BlockWriter.put

    def stop(self, *arguments):
        put(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(expert_module.BlockWriter, "put", stop)
        run(single, records.directory, tmp_path / "out", TUNED)
    tuned, tune = [], expert_module.Tuner.tune
    monkeypatch.setattr(expert_module.Tuner, "tune", lambda self, *rest: tuned.append(rest[-1]) or tune(self, *rest))
    run(single, records.directory, tmp_path / "out", TUNED)
    assert tuned == [1]
    assert file_digests(tmp_path / "out") == file_digests(made["tuned"])
    assert manifest_facts(tmp_path / "out") == manifest_facts(made["tuned"])


def test_residual_blocks_are_chosen_for_the_tuned_codes(made, single, records, tmp_path):
    settings = make_settings("hif4", *LEARNED, "solver.tune={steps: 8, lr: 0.01}", "solver.residual=0.3")
    manifest = run(single, records.directory, tmp_path / "out", settings)
    found, alone = tensors(tmp_path / "out"), tensors(made["tuned"])
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert [row.tuning for row in manifest.blocks] == [row.tuning for row in read_manifest(made["tuned"]).blocks]
    assert any(row.residual_blocks for row in manifest.layers)


def test_the_dry_run_says_what_it_takes(single, records, tmp_path):
    jobs = [Job(read_layout(single), records, settings, tmp_path / "out") for settings in (PLAIN, TUNED)]
    rates = Rates(1e9, 1e9, 1e9, 1e9, 0.0, 0.0)
    plan = describe(jobs[1])
    assert plan["tuning"] == "8 steps a block, transformer on 12 records, 4 held out" and "tuning" not in describe(
        jobs[0]
    )
    # 8 steps of 12 records there and back, 4 records twice, beside 16 records twice.
    forwards, tuned = (seconds(job, replace(rates, hessian=1e30, solve=1e30, values=1e30)) for job in jobs)
    assert tuned / forwards == pytest.approx((16 * 2 + 3 * 8 * 12 + 2 * 4) / (16 * 2), rel=1e-3)
    assert jobs[1].stream_bytes("transformer") == 1.5 * jobs[0].stream_bytes("transformer")


def record_of(prompt: str, number: int = 0) -> Record:
    values = {"timestep": 1.0, "sigma": 0.5, "d_sigma": 0.1, "branch": "cond", "expert": "transformer", "step": number}
    name = f"{prompt}-{number}-cond"
    return Record(record=name, file="records/00000.safetensors", sample_id=prompt, **values)


@pytest.mark.parametrize(
    ("prompts", "limit", "held_out"),
    [(2, None, [1]), (7, None, [6]), (8, None, [7]), (20, None, [7, 15]), (20, 9, [7]), (20, 2, [1])],
)
def test_whole_prompts_are_held_out(prompts, limit, held_out):
    records = [record_of(f"p{prompt}", number) for prompt in range(prompts) for number in range(3)]
    tuned, away = split(records, limit)
    assert [one.sample_id for one in away] == [f"p{prompt}" for prompt in held_out for _ in range(3)]
    assert sorted({one.sample_id for one in (*tuned, *away)}) == sorted(f"p{i}" for i in range(limit or prompts))
    assert not {one.sample_id for one in tuned} & {one.sample_id for one in away} and len(tuned) % 3 == 0


def test_records_of_one_prompt_are_refused_before_any_work(single, tmp_path):
    records = make_records(single, tmp_path / "records", prompts=1)
    with pytest.raises(UsageError, match=r"solver.tune holds out .* has records of 1 prompt alone") as caught:
        run(single, records.directory, tmp_path / "out", TUNED)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{steps: 0}", "solver.tune.steps"),
        ("{lr: 0}", "solver.tune.lr"),
        ("{lr: 0.2}", "solver.tune.lr"),
        ("{lr: .nan}", "solver.tune.lr"),
        ("{prompts: 1}", "solver.tune.prompts"),
        ("{rate: 1}", "Known keys: steps, lr, prompts"),
        ("1", "solver.tune: should be true, false or a group"),
    ],
)
def test_values_out_of_range_are_refused(value, words):
    with pytest.raises(UsageError) as caught:
        make_settings("hif4", *LEARNED, f"solver.tune={value}")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_true_is_every_default_and_off_leaves_no_trace():
    """What runs and manifests of before hold is what a recipe without tuning still says."""
    solvers = {value: make_settings("hif4", f"solver.tune={value}").recipe.solver for value in ("true", "{}", "false")}
    assert solvers["true"] == solvers["{}"] and solvers["true"].tune == TuneSettings()
    assert solvers["true"].needs_records and not solvers["false"].needs_records
    assert "tune" not in solvers["false"].model_dump(mode="json")
    assert solvers["true"].model_dump(mode="json")["tune"] == TuneSettings().model_dump(mode="json")


def test_a_module_without_blocks_is_refused():
    with pytest.raises(UsageError, match=r"solver.tune"):
        quantize_module(nn.Linear(64, 64), [{"input": torch.randn(4, 64)}], "hif4", TUNED.recipe)


@pytest.mark.parametrize("transform", ["none", "hadamard", "smoothed", "learned"])
@pytest.mark.parametrize("format_name", ["hif4", "mxfp4"])
def test_forward_is_that_of_the_quantized_layer_and_gradients_pass_the_roundings(format_name, transform):
    torch.manual_seed(0)
    scheme = Scheme.of(format_name, transform=transform, block=0 if transform == "none" else 64)
    exponents = (0.5,) if transform == "smoothed" else ()
    settings = SolverSettings(rounding="gptq", smoothing=exponents, tune=TuneSettings())
    linear, x = nn.Linear(128, 32), torch.randn(5, 7, 128) * torch.exp(torch.randn(128))
    stats = InputStats(x.flatten(0, 1).T @ x.flatten(0, 1), x.abs().amax((0, 1)), 35, 35, x.flatten(0, 1))
    (one,) = solve_group({"a": linear.weight.detach()}, stats, scheme, settings).values()
    layer = LatentLinear(
        linear, one.codes, one.target, SharedInput(scheme, one.basis, torch.device("cpu")), scheme.format
    )
    reference = QuantLinear.from_codes(one.codes, scheme, linear.bias.detach(), one.basis)
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, reference(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.codes().elements, one.codes.elements)
    g = torch.randn_like(y)
    y.backward(g)
    # As if the layer were x' W'^T with x' the changed input, W' and the quantized input themselves being constants.
    again = x.detach().requires_grad_()
    changed = scheme.transform.restore(torch.eye(128), one.basis)  # x' = x M, and this is M^T
    (again @ changed.T @ scheme.format.dequantize(one.codes).T).backward(g)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        scheme.transform_input(again.detach(), one.basis), again.detach() @ changed.T, rtol=1e-3, atol=1e-3
    )
    inputs = scheme.quantize_input(again.detach(), one.basis).flatten(0, 1)
    expected = (g.flatten(0, 1).T @ inputs) * scheme.format.steps(one.codes.scales)
    torch.testing.assert_close(layer.latent.grad, expected, rtol=1e-4, atol=1e-4)
