"""What quantize computes and reports, checked against the real transformers run from end to end."""

import gc
import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from quantization_helpers import ALL_TOKENS, FULL, file_digests, make_records, make_settings, run
from random_model import make_random_pipeline

from ptq import formats
from ptq.checkpoint.manifest import read_manifest, verify_files
from ptq.checkpoint.shards import ShardSet
from ptq.runtime import QuantLinear
from ptq.store.calibration import CalibrationSet
from ptq.wan.loading import load_pipeline
from ptq.wan.replay import ExpertReplay

EXACT = pytest.approx


@pytest.fixture(scope="module")
def checkpoint(single, single_records, tmp_path_factory):
    """The full engine on the single-expert model, errors measured on every token."""
    out = tmp_path_factory.mktemp("manifest") / "out"
    run(single, single_records, out, make_settings("mxfp4", *FULL, ALL_TOKENS))
    return out


def calls_of(records):
    """(importance, keyword arguments) of every record of a single-expert set; d_sigma^2 with mean 1."""
    items = list(records)
    mean = sum(r.d_sigma**2 for r in items) / len(items)
    for record in items:
        call = records.load(record)
        arguments = {name: getattr(call, name) for name in ("hidden_states", "timestep", "encoder_hidden_states")}
        yield record.d_sigma**2 / mean, {**arguments, "return_dict": False}


@torch.no_grad()
def watch(transformer, records, names):
    """Runs every record; returns module name -> inputs [T, K], block outputs, final outputs, importance of the records."""
    inputs, blocks, outputs = {name: [] for name in names}, {}, []

    def keep(name):
        def hook(_module, args):
            inputs[name].append(args[0].reshape(-1, args[0].shape[-1]))

        return hook

    handles = [transformer.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    for index, block in enumerate(transformer.blocks):
        hook = lambda _m, _a, out, index=index: blocks.setdefault(index, []).append(out)  # noqa: E731
        handles.append(block.register_forward_hook(hook))
    importance = []
    for weight, arguments in calls_of(records):
        importance.append(weight)
        outputs.append(transformer(**arguments)[0])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(value) for name, value in inputs.items()}, blocks, outputs, importance


def ratio(errors, signals, weights):
    """Weighted sum of squares of `errors` relative to that of `signals`; lists of tensors."""
    sums = [
        sum(w * float(x.double().square().sum()) for w, x in zip(weights, part, strict=True))
        for part in (errors, signals)
    ]
    return sums[0] / sums[1]


@torch.no_grad()
def test_errors_equal_a_run_of_the_real_transformers(single, single_records, checkpoint):
    records, manifest = CalibrationSet(single_records), read_manifest(checkpoint)
    original, packed = load_pipeline(single).transformer, load_pipeline(checkpoint).transformer
    names = [f"blocks.{row.block}.{row.layer}" for row in manifest.layers]
    assert len(names) == 20
    inputs, blocks, outputs, importance = watch(original, records, names)
    for row, name in zip(manifest.layers, names, strict=True):
        linear, layer = original.get_submodule(name), packed.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        x = inputs[name]
        signal = float((x @ linear.weight.T).double().square().sum())
        # Output error: the quantized layer as it runs, against the original layer.
        difference = (layer(x) - linear(x)).double()
        assert row.output_error == EXACT(float(difference.square().sum()) / signal, rel=2e-3)
        scheme, smooth = layer.scheme, layer.smooth
        basis = scheme.transform.weight(linear.weight.detach(), smooth)
        plain = formats.get("mxfp4").fake_quantize(basis)
        difference = (scheme.quantize_input(x, smooth) @ plain.T - x @ linear.weight.T).double()
        assert row.output_error_rtn == EXACT(float(difference.square().sum()) / signal, rel=2e-3)
        # Trace error: weights only, in the layer's basis, over all tokens.
        rotated = scheme.transform_input(x, smooth)
        chosen = formats.get("mxfp4").dequantize(layer.codes())
        for value, weight in ((row.trace_error, chosen), (row.trace_error_rtn, plain)):
            error = (rotated @ (weight - basis).T).double()
            assert value == EXACT(float(error.square().sum()) / signal, rel=5e-3)
        sqnr = 10 * math.log10(float(basis.square().sum() / (basis - chosen).square().sum()))
        assert row.weight_sqnr_db == EXACT(sqnr, abs=1e-3)
        assert row.trace_error <= row.trace_error_rtn
    _, blocks_q, outputs_q, _ = watch(packed, records, [])
    for row in manifest.blocks:
        a, b = blocks[row.block], blocks_q[row.block]
        errors = [x - y for x, y in zip(a, b, strict=True)]
        assert row.stream_error == EXACT(ratio(errors, a, [1.0] * len(a)), rel=1e-3)
    errors = [x - y for x, y in zip(outputs, outputs_q, strict=True)]
    assert manifest.experts[0].denoiser_error == EXACT(ratio(errors, outputs, importance), rel=1e-3)
    assert manifest.experts[0].records == len(records.records)


@pytest.mark.parametrize("name", ["rtn", "full"])
def test_gptq_is_never_worse_and_rtn_is_plain_rounding(model, uninterrupted, name):
    manifest = read_manifest(uninterrupted[name])
    verify_files(uninterrupted[name])
    assert len(manifest.layers) == 2 * 3 * 10
    if name == "full":
        assert all(row.trace_error <= row.trace_error_rtn for row in manifest.layers)
        assert sum(row.trace_error < 0.8 * row.trace_error_rtn for row in manifest.layers) > 30
        return
    original, packed = load_pipeline(model), load_pipeline(uninterrupted[name])
    for row in manifest.layers:
        linear = getattr(original, row.expert).get_submodule(f"blocks.{row.block}.{row.layer}")
        layer = getattr(packed, row.expert).get_submodule(f"blocks.{row.block}.{row.layer}")
        assert torch.equal(layer.dequantize(), formats.get("mxfp4").fake_quantize(linear.weight.detach()))
        assert row.trace_error is None and row.output_error == row.output_error_rtn


def test_streams_on_disk_give_the_same_files_and_leave_nothing(model, records, uninterrupted, tmp_path):
    run(model, records, tmp_path / "out", make_settings("hif4", *FULL), max_memory=0)
    assert file_digests(tmp_path / "out") == file_digests(uninterrupted["full"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in uninterrupted["full"].iterdir()}


def test_protected_blocks_keep_their_weights_and_are_named(model, records, uninterrupted, tmp_path):
    out = tmp_path / "out"
    manifest = run(
        model, records, out, make_settings("mxfp4", protected={"transformer": {1: "why"}, "transformer_2": {}})
    )
    assert manifest.high_precision == ["transformer:1"]
    row = next(r for r in manifest.blocks if r.high_precision)
    assert (row.expert, row.block, row.reason) == ("transformer", 1, "why")
    before, after = ShardSet(model / "transformer"), ShardSet(out / "transformer")
    kept = [name for name in before.entries if name.startswith("blocks.1.")]
    assert kept and all(torch.equal(before.read(n), after.read(n)) for n in kept)
    assert not any(n.endswith("weight_packed") and n.startswith("blocks.1.") for n in after.entries)
    whole = read_manifest(uninterrupted["rtn"])
    assert manifest.coverage.quantized_parameters == whole.coverage.quantized_parameters * 5 // 6
    assert manifest.experts[0].denoiser_error < whole.experts[0].denoiser_error
    assert isinstance(load_pipeline(out).transformer.blocks[1].attn1.to_q, torch.nn.Linear)


@pytest.mark.parametrize("name", ["rtn", "full"])
def test_coverage(model, records, uninterrupted, name):
    coverage = read_manifest(uninterrupted[name]).coverage
    pipe, calibration = load_pipeline(model), CalibrationSet(records)
    total = quantized = 0
    flops = {True: 0.0, False: 0.0}
    for expert in (pipe.transformer, pipe.transformer_2):
        rows, handles = {}, []
        for path, module in expert.named_modules():
            if isinstance(module, torch.nn.Linear):
                hook = lambda _m, args, path=path, rows=rows: rows.update({path: args[0].numel() // args[0].shape[-1]})  # noqa: E731
                handles.append(module.register_forward_pre_hook(hook))
        call = calibration.load(calibration.records[0])
        with torch.no_grad():
            expert(call.hidden_states, call.timestep, call.encoder_hidden_states)
        for path, count in rows.items():
            size = expert.get_submodule(path).weight.numel()
            total += size
            quantized += size if path.startswith("blocks.") else 0
            flops[path.startswith("blocks.")] += 2.0 * size * count
    assert (coverage.linear_parameters, coverage.quantized_parameters) == (total, quantized)
    assert coverage.parameter_share == EXACT(quantized / total)
    assert coverage.flop_share == EXACT(flops[True] / (flops[True] + flops[False]))
    on_disk = sum(
        entry.nbytes
        for expert in ("transformer", "transformer_2")
        for entry in ShardSet(uninterrupted[name] / expert).entries.values()
        if entry.name.endswith((".weight_packed", ".weight_scale"))
    )
    assert coverage.quantized_bytes == on_disk == quantized * {"rtn": 4.25, "full": 4.5}[name] / 8


def loaded_blocks():
    gc.collect()
    return [m for m in gc.get_objects() if type(m) is WanTransformerBlock and not m.scale_shift_table.is_meta]


def test_one_block_at_a_time_is_in_memory(tmp_path, monkeypatch):
    path = make_random_pipeline(tmp_path / "deep", "TI2V-5B", layers=4, width=64)
    calibration = make_records(path, tmp_path / "records", prompts=1, records=2)
    loaded, most = [], []
    earlier = {id(block) for block in loaded_blocks()}  # of the pipeline that made the records
    original = ExpertReplay.load_block

    def load(self, index):
        block = original(self, index)
        loaded.append(index)
        most.append(len([alive for alive in loaded_blocks() if id(alive) not in earlier]))
        return block

    monkeypatch.setattr(ExpertReplay, "load_block", load)
    run(path, calibration.directory, tmp_path / "out", make_settings("mxfp4"))
    assert loaded == list(range(4)) and max(most) == 1
