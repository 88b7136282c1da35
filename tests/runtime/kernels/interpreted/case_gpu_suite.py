"""The GPU suite's own code on small shapes: its checks pass, notice a wrong kernel, and its tables have the right rows."""

import dataclasses
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[4] / "scripts"))
import gpu_correctness
import gpu_measure
import gpu_suite

from ptq.runtime.kernels.tiles import Tile

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
CPU = torch.device("cpu")
SMALL = gpu_suite.DRY.cases


def test_every_check_passes():
    checks = list(gpu_correctness.run(CPU, [gpu_correctness.Case(70, 64, 256)], rows=(1, 7)))
    assert len(checks) > 15
    assert [one for one in checks if not one.passed] == []


@pytest.mark.parametrize(
    ("function", "spoil"),
    [
        ("gemm_fp8", lambda y: y * 1.01),
        ("gemm_packed", lambda y: y + 1e-3 * y.abs().max()),
        ("expand_weight", lambda w: torch.where(w.float() == w.float().max(), 0.0, w.float()).to(w.dtype)),
        ("quantize", lambda q: dataclasses.replace(q, values=q.values.flip(0))),
        ("round_columns", lambda elements: elements.flip(0)),
    ],
)
def test_a_wrong_kernel_fails_its_check(monkeypatch, function, spoil):
    kernel = getattr(gpu_correctness, function)
    monkeypatch.setattr(gpu_correctness, function, lambda *args, **kwargs: spoil(kernel(*args, **kwargs)))
    assert any(not one.passed for one in gpu_correctness.run(CPU, SMALL, rows=()))


def test_the_lowest_bit_of_a_scale_word_counts():
    words = torch.tensor([1 << 30, 5], dtype=torch.int32)
    assert gpu_correctness._mismatch(words, words + torch.tensor([1, 0], dtype=torch.int32)) == 0.5


def test_nan_never_passes():
    assert not gpu_correctness.Check("x", float("nan"), 1.0).passed


def test_tables_of_kernels(monkeypatch):
    monkeypatch.setattr(gpu_measure, "TILE_CANDIDATES", (Tile(16, 32, 64), Tile(32, 32, 64)))
    bandwidth = gpu_measure.quantizer_bandwidth(16, 128, CPU, 1)
    assert {"copy", "mxfp4 fp8", "hif4 bf16"} <= {row["job"] for row in bandwidth}
    assert bandwidth[0]["of copy"] == 1.0 and all(row["GB/s"] > 0 for row in bandwidth)
    tiles = gpu_measure.tile_candidates(16, 64, 64, CPU, 1)
    assert len(tiles) == 2 and tiles[0]["TFLOP/s"] >= tiles[1]["TFLOP/s"]


def test_table_of_a_block_shows_the_memory_saved():
    rows = {row["candidate"]: row for row in gpu_measure.block_linears(64, 128, 256, CPU, 1)}
    values, blocks = 8 * 128 * 128 + 2 * 128 * 256, 128 * (9 * 128 + 256)
    for name, bits in (("mxfp4", 4.25), ("hif4", 4.5)):
        assert rows[name]["memory ratio"] == pytest.approx((values * bits / 8 + blocks) / (2 * values))


def test_denoiser_step_quantizes_ten_linears_a_block_of_one_model_at_a_time(monkeypatch):
    alive, build = [], gpu_measure._denoiser

    def counted(*arguments):
        assert not any(reference() is not None for reference in alive)
        model, inputs = build(*arguments)
        alive.append(weakref.ref(model))
        return model, inputs

    monkeypatch.setattr(gpu_measure, "_denoiser", counted)
    geometry = gpu_measure.SMALL
    rows = gpu_measure.denoiser_step(geometry, CPU, 1, "eager")
    assert len(alive) == 8
    names = ["bf16", "mxfp4", "hif4", "hif4-fast"]
    assert [row["candidate"] for row in rows] == [name + end for name in names for end in (", compiled", "")]
    model, inputs = build(geometry, CPU)
    before = model(**inputs).sample
    assert gpu_measure.quantize_blocks(model, gpu_measure.recipe_schemes()["hif4"]) == 20
    after = model(**inputs).sample
    assert 0 < (after - before).norm() / before.norm() < 0.3


def test_steps_with_attention_in_fp8_where_the_package_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "generation" / "stand_in"))
    monkeypatch.setattr(gpu_measure, "obstacle", lambda device: None)
    monkeypatch.setattr(gpu_measure, "recipe_schemes", dict)
    rows = {row["candidate"]: row for row in gpu_measure.denoiser_step(gpu_measure.SMALL, CPU, 1, "eager")}
    assert list(rows) == ["bf16, compiled", "bf16", "bf16, compiled, fa3-fp8"]
    assert rows["bf16, compiled, fa3-fp8"]["attention"] == "fa3-fp8"
    from fa3_fwd_interface import calls

    assert torch.float8_e4m3fn in {dtype for dtype, _ in calls}


def test_a_stage_that_breaks_does_not_stop_the_others(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(gpu_suite.ui, "info", lines.append)

    def breaks():
        raise ValueError("out of luck")

    checks = [{"name": "gemm", "value": 2.0, "limit": 1.0, "passed": False}]
    block = [{"candidate": "mxfp4", "speedup": 1.5}]
    assert (
        gpu_suite.run_stages({"correctness": lambda: checks, "linears": breaks, "block": lambda: block}, CPU, tmp_path)
        == 1
    )
    assert {path.name for path in tmp_path.iterdir()} == {"correctness.json", "block.json"}
    assert lines[-3:] == [
        "linears BROKE: ValueError: out of luck",
        "correctness: 0 of 1 checks passed, FAILED: gemm",
        "block: mxfp4 1.50x",
    ]
    assert gpu_suite.run_stages({"block": lambda: block}, CPU, tmp_path) == 0


def test_dry_run(monkeypatch, tmp_path):
    """Every stage on small shapes; on a CPU the FP8 baseline is left out."""
    lines = []
    monkeypatch.setattr(gpu_suite.ui, "info", lines.append)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--dry-run", "--out", str(tmp_path)])
    assert gpu_suite.main() == 0
    found = {path.stem for path in tmp_path.iterdir()}
    assert found == {"correctness", "linears", "block", "quantizer", "denoiser_small", "solve"}
    assert lines[-6].startswith("correctness: ") and lines[-2].startswith("denoiser_small: bf16, compiled 1.00x")
    assert re.fullmatch(r"solve: hif4 \S+ s, mxfp4 \S+ s", lines[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_refuses(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path / "results")])
    assert gpu_suite.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
