"""The job's estimates against what a run really leaves and holds."""

import pytest
from quantization_helpers import FULL, make_settings
from typer.testing import CliRunner

from ptq.checkpoint.shards import ShardSet
from ptq.cli.app import app
from ptq.quantization.job import Job, QuantizeOptions
from ptq.quantization.plan import describe, needs
from ptq.quantization.workdir import WorkDir
from ptq.store.calibration import CalibrationSet
from ptq.wan.estimates import LIBRARY_BYTES
from ptq.wan.layout import read_layout


@pytest.fixture
def job(model, records, tmp_path):
    """(settings, options) -> the run that they ask for."""

    def make(settings, **options) -> Job:
        out = tmp_path / "out"
        return Job(read_layout(model), CalibrationSet(records), settings, out, QuantizeOptions(**options))

    return make


def test_packed_bytes_are_those_of_the_checkpoint(job, uninterrupted):
    written = sum(
        entry.nbytes
        for expert in ("transformer", "transformer_2")
        for entry in ShardSet(uninterrupted["rtn"] / expert).entries.values()
    )
    assert job(make_settings("mxfp4")).packed_bytes() == written


def test_streams_are_two_float32_tensors_of_every_record(job):
    full = job(make_settings("mxfp4", *FULL))
    config, found = full.layout.experts["transformer"], full.calibration
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = [found.shape(record)[1:] for record in found.of_expert("transformer")]
    elements = [t * (h // 2) * (w // 2) * width for t, h, w in tokens]
    assert full.stream_bytes("transformer") == 2 * 4 * sum(elements)
    # Plain rounding replays two records for its report.
    assert job(make_settings("mxfp4")).stream_bytes("transformer") == 2 * 4 * sum(elements[:2])


def test_needs_follow_the_options(job, tmp_path):
    plain, gptq = make_settings("hif4"), make_settings("hif4", "solver.rounding=gptq")
    need = needs(job(plain))
    assert needs(job(gptq)).ram > need.ram  # Hessians
    assert needs(job(plain, link=True)).disk < need.disk
    streams = max(map(job(plain).stream_bytes, job(plain).layout.experts))
    spilled = needs(job(plain, max_memory=0))
    assert (spilled.disk, spilled.ram) == (need.disk + streams, need.ram - streams)
    on_gpu = needs(job(plain, device="cuda"))
    # On a GPU they are bfloat16.
    assert on_gpu.ram == streams // 2 + LIBRARY_BYTES and 0 < on_gpu.vram < need.ram
    (tmp_path / "out.partial" / "blocks").mkdir(parents=True)
    (tmp_path / "out.partial" / "blocks" / "0").write_bytes(b"x" * 1000)
    assert needs(job(plain)).disk == need.disk - 1000


@pytest.mark.parametrize("format_name", ["hif4", "mxfp4"])
def test_the_plan_is_told_in_words(job, tmp_path, format_name):
    rows = describe(job(make_settings(format_name)))
    assert "blocks, 2 of 6 records of" in rows["transformer"] and rows["time, estimated"].endswith("on cpu")
    assert rows["W4A4 share of Linear parameters"].endswith("%") and not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_the_run_would(job, model, records, tmp_path):
    begun = job(make_settings("hif4", "solver.residual=0.1", protected={"transformer": {}, "transformer_2": {}}))
    WorkDir(begun.out, begun.signature).begin()
    before = (tmp_path / "out.partial" / "run.json").read_bytes()
    command = ["quantize", str(model), "--calibration", str(records), "--format", "hif4", "--recipe", "rtn"]
    command += ["--out", str(begun.out), "--dry-run", "--set"]
    other, same, fresh = (
        CliRunner().invoke(app, [*command, *more])
        for more in (["solver.residual=0.2"], ["solver.residual=0.1"], ["solver.residual=0.2", "--fresh"])
    )
    assert "different: recipe.solver.residual" in str(other.exception)
    assert (same.exit_code, fresh.exit_code) == (0, 0) and "Quantization plan" in same.stdout
    assert (tmp_path / "out.partial" / "run.json").read_bytes() == before
