"""`ptq bench linear`: the candidates, their figures, and bad requests."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from ptq.cli.bench import linear
from ptq.errors import UsageError
from ptq.runtime import backends, bench_linear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_forced():
    yield
    backends.use_backend(None)


def invoke(*arguments):
    app = typer.Typer()
    app.command()(linear)
    return CliRunner().invoke(app, arguments)


def test_figures_of_one_shape():
    rows = {row.candidate: row for row in bench_linear.measure_shape((32, 128, 256), CPU, repeats=3)}
    assert list(rows) == [
        "float32",
        "bf16",
        "mxfp4 fake-quant",
        "mxfp4 ptq",
        "hif4 fake-quant",
        "hif4 ptq",
        "hif4-fast fake-quant",
        "hif4-fast ptq",
    ]
    base = rows["float32"]
    assert base.speedup == 1.0 and base.weight_bytes == 4 * 128 * 256
    for row in rows.values():
        assert row.tflops == pytest.approx(2 * 32 * 128 * 256 / row.seconds / 1e12)
        assert row.speedup == pytest.approx(base.seconds / row.seconds)
    assert rows["mxfp4 ptq"].weight_bytes == 128 * 256 * (4 + 4.25 / 8) + 256 * 128  # cache, codes, blocks
    assert rows["hif4 ptq"].weight_bytes == 128 * 256 * (4 + 4.5 / 8) + 256 * 128
    assert rows["mxfp4 ptq"].error < 1e-6 and rows["hif4 ptq"].error < 1e-6


def test_only_codes_are_kept_where_the_cache_is_too_small(monkeypatch):
    monkeypatch.setattr(bench_linear.cpu.decoded_cache, "limit_bytes", 1000)
    rows = {row.candidate: row for row in bench_linear.measure_shape((8, 64, 64), CPU, repeats=1)}
    assert rows["mxfp4 ptq"].weight_bytes == 64 * 64 * (4.25 / 8 + 1)


def test_a_wrong_result_shows_in_the_error_column(monkeypatch):
    correct = bench_linear.QuantLinear.forward
    monkeypatch.setattr(bench_linear.QuantLinear, "forward", lambda self, x: correct(self, x) * 1.01)
    rows = {row.candidate: row for row in bench_linear.measure_shape((8, 64, 64), CPU, repeats=1)}
    assert rows["mxfp4 ptq"].error > 5e-3 and rows["mxfp4 fake-quant"].error < 1e-6


def test_candidates_take_turns_in_shifting_order_and_the_median_counts(monkeypatch):
    calls = []
    ticks = iter([0, 0] * 4 + [0, 1, 0, 5, 0, 7, 0, 2, 0, 30, 0, 6])  # two warm-up rounds of two, then three rounds
    monkeypatch.setattr(bench_linear.time, "perf_counter", lambda: next(ticks))
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert bench_linear.median_seconds(runs, CPU, 3) == {"a": 6, "b": 2}
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b", "b", "a"]


def test_command_prints_a_table_and_json():
    result = invoke("--shape", "8x64x64", "--device", "cpu", "--repeats", "1", "--json")
    assert result.exit_code == 0
    payload = json.loads(result.stdout)
    assert {row["candidate"] for row in payload["measurements"]} >= {"float32", "mxfp4 ptq", "hif4 ptq"}
    assert payload["measurements"][0]["shape"] == [8, 64, 64]
    table = invoke("--shape", "8x64x64", "--device", "cpu", "--repeats", "1")
    assert "8x64x64" in table.stdout and "hif4 ptq" in table.stdout


@pytest.mark.parametrize("shape", ["8x64", "0x64x64", "8x64x63", "eight"])
def test_bad_shape(shape):
    error = invoke("--shape", shape).exception
    assert isinstance(error, UsageError) and shape in str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    assert isinstance(invoke("--device", "cuda").exception, UsageError)
    forced = invoke("--shape", "8x64x64", "--backend", "triton-fp8").exception
    assert isinstance(forced, UsageError) and "the tensors are on cpu" in str(forced)
