"""The plan's figures against what a run really leaves and holds."""

import pytest
from quantization_helpers import FULL, make_settings

from ptq.calibration.records import CalibrationSet
from ptq.checkpoint.shards import ShardSet
from ptq.quantization.plan import LIBRARY_BYTES, describe_plan, estimate_needs, packed_bytes, stream_bytes
from ptq.wan.layout import read_layout


def test_packed_bytes_are_those_of_the_checkpoint(model, uninterrupted):
    written = sum(
        entry.nbytes
        for expert in ("transformer", "transformer_2")
        for entry in ShardSet(uninterrupted["rtn"] / expert).entries.values()
    )
    assert packed_bytes(read_layout(model), make_settings("mxfp4")) == written


def test_streams_are_two_float32_tensors_of_every_record(model, records):
    layout, found = read_layout(model), CalibrationSet(records)
    config = layout.experts["transformer"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = [found.shape(record)[1:] for record in found.of_expert("transformer")]
    elements = [t * (h // 2) * (w // 2) * width for t, h, w in tokens]
    assert stream_bytes(layout, found, make_settings("mxfp4", *FULL), "transformer") == 2 * 4 * sum(elements)
    # Plain rounding replays two records for its report.
    assert stream_bytes(layout, found, make_settings("mxfp4"), "transformer") == 2 * 4 * sum(elements[:2])


def test_needs_follow_the_options(model, records, tmp_path):
    layout, found = read_layout(model), CalibrationSet(records)
    plain, gptq = make_settings("hif4"), make_settings("hif4", "rounding=gptq")
    out = tmp_path / "out"
    need = estimate_needs(layout, found, plain, "cpu", out)
    assert estimate_needs(layout, found, gptq, "cpu", out).ram > need.ram  # Hessians
    assert estimate_needs(layout, found, plain, "cpu", out, link=True).disk < need.disk
    streams = max(stream_bytes(layout, found, plain, expert) for expert in layout.experts)
    spilled = estimate_needs(layout, found, plain, "cpu", out, max_memory=0)
    assert (spilled.disk, spilled.ram) == (need.disk + streams, need.ram - streams)
    on_gpu = estimate_needs(layout, found, plain, "cuda", out)
    assert on_gpu.ram == streams + LIBRARY_BYTES and 0 < on_gpu.vram < need.ram
    (tmp_path / "out.partial" / "blocks").mkdir(parents=True)
    (tmp_path / "out.partial" / "blocks" / "0").write_bytes(b"x" * 1000)
    assert estimate_needs(layout, found, plain, "cpu", out).disk == need.disk - 1000


@pytest.mark.parametrize("format_name", ["hif4", "mxfp4"])
def test_the_plan_is_told_in_words(model, records, tmp_path, format_name):
    rows = describe_plan(
        read_layout(model), CalibrationSet(records), make_settings(format_name), "cpu", tmp_path / "out"
    )
    assert "blocks, 2 of 6 records of" in rows["transformer"] and rows["time, estimated"].endswith("on cpu")
    assert rows["W4A4 share of Linear parameters"].endswith("%") and not list(tmp_path.iterdir())
