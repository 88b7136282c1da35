"""Everything a user can get wrong: one clear error, nothing half-written; difficult statistics: a sound result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from children import start_child
from quantization_helpers import (
    FULL,
    edit_weights,
    file_digests,
    make_records,
    make_settings,
    run,
    run_with_small_files,
)
from random_model import make_random_pipeline

from ptq.errors import PtqError, UsageError
from ptq.quantization.job import Job
from ptq.quantization.plan import describe
from ptq.quantization.settings import parse_high_precision
from ptq.store.calibration import CalibrationSet
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline

RTN = make_settings("mxfp4")
FULL_HIF4 = make_settings("hif4", *FULL)


def refused(model: Path, records: Path, out: Path, settings, match: str, kind: type = PtqError) -> None:
    with pytest.raises(kind, match=match):
        run(model, records, out, settings)
    assert not out.exists()
    assert not list(out.parent.glob("**/.*.part"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_weight_names_file_and_tensor_and_keeps_finished_blocks(
    single_copy, single, single_records, tmp_path, value
):
    def damage(tensors):
        tensors["blocks.1.ffn.net.2.weight"][3, 7] = value

    edit_weights(single_copy, "transformer", damage)
    out = tmp_path / "out"
    refused(
        single_copy,
        single_records,
        out,
        RTN,
        r"model\S*\.safetensors: tensor blocks\.1\.ffn\.net\.2\.weight.*NaN or inf",
    )
    assert (tmp_path / "out.partial/blocks/transformer/00000.json").exists()
    shutil.copytree(single / "transformer", single_copy / "transformer", dirs_exist_ok=True)
    run(single_copy, single_records, out, RTN)
    run(single, single_records, tmp_path / "direct", RTN)
    assert file_digests(out) == file_digests(tmp_path / "direct")


def test_weights_of_another_shape(single_copy, single_records, tmp_path):
    edit_weights(single_copy, "transformer", lambda t: t.update({"blocks.0.attn1.to_q.weight": torch.zeros(64, 32)}))
    refused(
        single_copy,
        single_records,
        tmp_path / "out",
        RTN,
        r"blocks\.0\.attn1\.to_q\.weight has shape \[64, 32\].*\[64, 64\]",
    )


def test_a_missing_tensor(single_copy, single_records, tmp_path):
    index = next((single_copy / "transformer").glob("*.index.json"))
    content = json.loads(index.read_text())
    del content["weight_map"]["proj_out.weight"]
    index.write_text(json.dumps(content))
    edit_weights(single_copy, "transformer", lambda tensors: tensors.pop("proj_out.weight"))
    refused(single_copy, single_records, tmp_path / "out", RTN, r"no tensor proj_out\.weight")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_shard(model, records, tmp_path, damage):
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    shard = sorted((copy / "transformer_2").glob("*.safetensors"))[1]
    shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:-9])
    refused(copy, records, tmp_path / "out", RTN, rf"{shard.name} (does not exist|is truncated)")
    assert not (tmp_path / "out.partial").exists()  # before any work


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_an_existing_output_is_never_touched(single, single_records, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(UsageError, match=r"exists already.*never overwritten"):
        run(single, single_records, out, RTN)
    assert (out if kind == "file" else out / "mine").read_text() == "mine"
    assert not (tmp_path / "out.partial").exists()


def test_an_empty_output_directory_is_fine(single, single_records, tmp_path):
    (tmp_path / "out").mkdir()
    run(single, single_records, tmp_path / "out", RTN)
    assert (tmp_path / "out" / "ptq_manifest.json").exists()


@pytest.mark.parametrize("limit", [20_000, 70_000, 120_000])
def test_a_full_disk_is_an_error_and_a_later_run_finishes(single, single_records, tmp_path, limit):
    """No file may pass the limit: a block's, then a shard's, then a copied component's."""
    out = tmp_path / "out"
    child = start_child(run_with_small_files, limit, single, single_records, out, RTN)
    child.join(120)
    assert child.exitcode == 7 and not out.exists() and not list(tmp_path.glob("**/.*.part"))
    run(single, single_records, out, RTN)
    run(single, single_records, tmp_path / "direct", RTN)
    assert file_digests(out) == file_digests(tmp_path / "direct")


def test_widths_that_do_not_fit_stop_before_any_work(tmp_path):
    path = make_random_pipeline(tmp_path / "odd", "TI2V-5B", layers=1, width=64, ffn=160)
    records = make_records(path, tmp_path / "records", prompts=1, records=2)
    settings, text = make_settings("hif4"), r"transformer of \S+, ffn\.net\.2: K = 160 is not a multiple of 64\b"
    refused(path, records.directory, tmp_path / "out", settings, text, UsageError)
    with pytest.raises(UsageError, match=text):
        describe(Job(read_layout(path), records, settings, tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()
    for name, transform in (("plain", "none"), ("rotated", "hadamard")):  # 160 is a multiple of 32
        run(path, records.directory, tmp_path / name, make_settings("mxfp4", f"scheme.transform={transform}"))


@pytest.mark.parametrize(("fmt", "limit"), [("hif4", 2), ("mxfp4", 5)])
def test_too_many_protected_blocks(model, records, tmp_path, fmt, limit):
    blocks = [
        "transformer:0",
        "transformer:1",
        "transformer:2",
        "transformer_2:0",
        "transformer_2:1",
        "transformer_2:2",
    ]
    chosen = parse_high_precision(",".join(blocks[: limit + 1]), {"transformer": 3, "transformer_2": 3})
    settings = make_settings(fmt, protected=chosen)
    refused(
        model, records, tmp_path / "out", settings, rf"{limit + 1} blocks .* {fmt} allows at most {limit}", UsageError
    )


@pytest.mark.parametrize("text", ["transformer:3", "transformer_3:0", "transformer", "0", "transformer:-1"])
def test_protected_blocks_that_do_not_exist(text):
    with pytest.raises(UsageError, match=r"transformer"):
        parse_high_precision(text, {"transformer": 3, "transformer_2": 3})


def test_records_taken_for_another_variant(single, single_records, copy_of, tmp_path):
    """What an earlier version recorded from Wan 2.1, which it took for T2V-A14B."""
    records = copy_of(single_records)
    settings = json.loads((records / "calibration.json").read_text())
    (records / "calibration.json").write_text(json.dumps({**settings, "variant": "T2V-A14B"}))
    refused(single, records, tmp_path / "out", RTN, "taken for T2V-A14B.*Record this model again", UsageError)


def test_records_of_another_model(single, model, records, single_records, tmp_path):
    for path, other in ((single, records), (model, single_records)):
        refused(path, other, tmp_path / "out", RTN, "recorded from another model", UsageError)


def test_no_records_of_an_expert(model, tmp_path):
    calibration = make_records(model, tmp_path / "records", prompts=1, records=2)
    assert {r.expert for r in calibration} == {"transformer"} or {r.expert for r in calibration} == {"transformer_2"}
    missing = ({"transformer", "transformer_2"} - {r.expert for r in calibration}).pop()
    refused(model, calibration.directory, tmp_path / "out", RTN, rf"no records of {missing}\. Record more", UsageError)
    with pytest.raises(UsageError, match=f"no records of {missing}"):
        describe(Job(read_layout(model), calibration, RTN, tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


def test_a_changed_record_is_refused(single, single_records, tmp_path):
    copy = Path(shutil.copytree(single_records, tmp_path / "records"))
    path = copy / "records" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    refused(single, copy, tmp_path / "out", RTN, r"00001\.safetensors .*changed since recording")


def test_a_packed_checkpoint_is_not_quantized_again(model, records, uninterrupted, tmp_path):
    refused(uninterrupted["rtn"], records, tmp_path / "out", RTN, "already a packed checkpoint", UsageError)


def finite_and_usable(out: Path) -> None:
    """The checkpoint runs and gives finite latents."""
    arguments = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
    latents = load_pipeline(out)("a ball", negative_prompt="bad", output_type="latent", **arguments).frames
    assert torch.isfinite(latents).all()


def zero_weight(tensors):
    tensors["blocks.0.attn1.to_q.weight"].zero_()


def dead_channels(tensors):  # gelu(0) = 0: a quarter of the hidden channels of block 0 never fires
    tensors["blocks.0.ffn.net.0.proj.weight"][:32] = 0
    tensors["blocks.0.ffn.net.0.proj.bias"][:32] = 0


def constant_input(tensors):  # every token of block 0's ffn.net.2 is the same vector
    tensors["blocks.0.ffn.net.0.proj.weight"].zero_()


def all_dead(tensors):
    constant_input(tensors)
    tensors["blocks.0.ffn.net.0.proj.bias"].zero_()


@pytest.mark.parametrize("edit", [zero_weight, dead_channels, constant_input, all_dead])
def test_degenerate_layers_have_a_sound_result(single_copy, edit, tmp_path):
    edit_weights(single_copy, "transformer", edit)
    records = make_records(single_copy, tmp_path / "records", prompts=1, records=2)
    out = tmp_path / "out"
    manifest = run(single_copy, records.directory, out, FULL_HIF4)
    rows = {row.layer: row for row in manifest.layers if row.block == 0}
    assert all(row.trace_error <= row.trace_error_rtn for row in manifest.layers)
    if edit is zero_weight:
        row = rows["attn1.to_q"]
        assert (row.weight_sqnr_db, row.output_error, row.trace_error) == (None, 0.0, 0.0)
    elif edit is all_dead:
        assert rows["ffn.net.2"].dead_columns == 128 and rows["ffn.net.2"].output_error == 0.0
    finite_and_usable(out)
    assert CalibrationSet(records.directory).digest == manifest.calibration["digest"]


def test_dead_channels_are_counted_without_rotation(single_copy, tmp_path):
    edit_weights(single_copy, "transformer", dead_channels)
    records = make_records(single_copy, tmp_path / "records", prompts=1, records=2)
    settings = make_settings("hif4", "solver.rounding=gptq")
    manifest = run(single_copy, records.directory, tmp_path / "out", settings)
    dead = {(row.block, row.layer): row.dead_columns for row in manifest.layers if row.dead_columns}
    assert dead == {(0, "ffn.net.2"): 32}


def test_fewer_tokens_than_channels(single, tmp_path):
    """Sixteen text tokens for 64 channels: a singular Hessian, damped and reported, never replaced."""
    records = make_records(single, tmp_path / "records", prompts=1, records=2)
    manifest = run(single, records.directory, tmp_path / "out", FULL_HIF4)
    rows = [row for row in manifest.layers if row.layer.startswith("attn2.to_k")]
    assert all(row.damping >= 0.01 and row.trace_error < 0.7 * row.trace_error_rtn for row in rows)
    finite_and_usable(tmp_path / "out")
