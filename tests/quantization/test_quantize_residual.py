"""Residual blocks of a checkpoint: the codes of a run without them, one budget an expert, resumed as every run, bad lists refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantization_helpers import LEARNED, file_digests, make_settings, manifest_facts, run
from torch import nn

from ptq.checkpoint.manifest import read_manifest
from ptq.checkpoint.shards import ShardSet
from ptq.errors import PtqError, UsageError
from ptq.quantization import expert as expert_module
from ptq.quantization.hybrid import HybridExpert
from ptq.quantization.module import quantize_module
from ptq.report.method import describe_method
from ptq.runtime import QuantLinear
from ptq.store.calibration import CalibrationSet
from ptq.store.files import read_json
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline
from ptq.wan.replay import ExpertReplay

SHARE = 0.3
SETTINGS = make_settings("hif4", *LEARNED, f"solver.residual={SHARE}")


@pytest.fixture(scope="module")
def made(single, single_records, tmp_path_factory) -> dict[str, Path]:
    """The same checkpoint without and with residual blocks."""
    root = tmp_path_factory.mktemp("residual")
    run(single, single_records, root / "plain", make_settings("hif4", *LEARNED))
    run(single, single_records, root / "residual", SETTINGS)
    return {name: root / name for name in ("plain", "residual")}


def listed(checkpoint: Path) -> dict[str, list[int]]:
    return read_json(checkpoint / "transformer" / "config.json")["quantization_config"]["residual"]["layers"]


def test_codes_are_those_without_and_the_budget_is_kept(made):
    weights = [file for file in file_digests(made["plain"]) if file.endswith(".safetensors")]
    assert all(file_digests(made["plain"])[file] == file_digests(made["residual"])[file] for file in weights)
    plain, manifest = read_manifest(made["plain"]), read_manifest(made["residual"])
    of = {f"blocks.{row.block}.{row.layer}": list(row.residual_blocks) for row in manifest.layers}
    assert {name: blocks for name, blocks in of.items() if blocks} == listed(made["residual"])
    rows = {f"blocks.{row.block}.{row.layer}": row.shape for row in manifest.layers}
    spent = sum(64 * len(blocks) * rows[name][0] for name, blocks in of.items())
    assert 0.5 * SHARE < spent / sum(map(math.prod, rows.values())) <= SHARE
    # Rows of each input as the statistics counted them.
    added = sum(64 * len(row.residual_blocks) * row.shape[0] * row.tokens for row in manifest.layers)
    plainly = sum(math.prod(row.shape) * row.tokens for row in manifest.layers)
    assert manifest.coverage.residual_share == pytest.approx(added / plainly, rel=1e-9)
    packed, others = plain.coverage.flop_share, 1 - plain.coverage.flop_share
    packed *= 1 + manifest.coverage.residual_share
    assert manifest.coverage.flop_share == pytest.approx(packed / (packed + others), rel=1e-9)
    assert of["blocks.0.attn1.to_q"] == of["blocks.0.attn1.to_k"] == of["blocks.0.attn1.to_v"]
    assert manifest.experts[0].denoiser_error < 0.9 * plain.experts[0].denoiser_error
    assert [row.output_error for row in manifest.layers] == [row.output_error for row in plain.layers]
    assert "residual" not in read_json(made["plain"] / "transformer" / "config.json")["quantization_config"]


def test_what_was_measured_is_what_the_checkpoint_computes(made, single, single_records):
    original, packed = read_layout(single), read_layout(made["residual"])
    replays = [
        ExpertReplay(ShardSet(one.path / "transformer"), one.experts["transformer"]) for one in (original, packed)
    ]
    hybrid = HybridExpert("transformer", *replays, CalibrationSet(single_records))
    expected = read_manifest(made["residual"]).experts[0].denoiser_error
    assert hybrid.error([True] * hybrid.num_blocks) == pytest.approx(expected, rel=1e-3)
    pipe = load_pipeline(made["residual"])
    layers = {name: m for name, m in pipe.transformer.named_modules() if isinstance(m, QuantLinear)}
    found = {name: list(layer.packed.blocks) for name, layer in layers.items()}
    assert {name: blocks for name, blocks in found.items() if blocks} == listed(made["residual"])
    assert all(layer.residual is not None for layer in layers.values())


@pytest.mark.parametrize("after", [1, 2])
def test_a_stopped_run_goes_on(made, single, single_records, tmp_path, monkeypatch, after):
    out, original, left = tmp_path / "out", expert_module.BlockWriter.put, [after]

    def put(self, *arguments):
        original(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(expert_module.BlockWriter, "put", put)
        run(single, single_records, out, SETTINGS)
    solved, solve = [], expert_module.solve_block
    monkeypatch.setattr(expert_module, "solve_block", lambda *rest: solved.append(1) or solve(*rest))
    run(single, single_records, out, SETTINGS)
    assert len(solved) == 2 - after
    assert file_digests(out) == file_digests(made["residual"])
    assert manifest_facts(out) == manifest_facts(made["residual"])


def test_protected_blocks_leave_the_budget_to_the_others(model, records, tmp_path):
    settings = make_settings("hif4", "solver.residual=0.3", auto_protect=True)
    manifest = run(model, records, tmp_path / "out", settings)
    protected = {tuple(name.split(":")) for name in manifest.high_precision}
    assert protected and not any((row.expert, str(row.block)) in protected for row in manifest.layers)
    for expert in ("transformer", "transformer_2"):
        rows = [row for row in manifest.layers if row.expert == expert]
        spent = sum(64 * len(row.residual_blocks) * row.shape[0] for row in rows)
        assert 0.2 < spent / sum(math.prod(row.shape) for row in rows) <= 0.3


def test_a_share_that_no_block_fits_into_is_said(single, single_records, tmp_path, capfd):
    manifest = run(single, single_records, tmp_path / "out", make_settings("hif4", "solver.residual=1e-6"))
    assert manifest.coverage.residual_share == 0
    assert "No residual block of transformer fits into solver.residual = 1e-06" in " ".join(
        capfd.readouterr().err.split()
    )
    texts = [(tmp_path / "out/README.md").read_text(), *(step.text for step in describe_method(manifest))]
    assert not any("once more" in text for text in texts)


def edited(made: dict[str, Path], tmp_path: Path, edit: Callable[[dict], None]) -> Path:
    copy = Path(shutil.copytree(made["residual"], tmp_path / "copy"))
    file = copy / "transformer" / "config.json"
    config = read_json(file)
    edit(config["quantization_config"]["residual"])
    file.write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([0, 0], "ascending order, each once; found [0, 0]"),
        ([1, 0], "ascending order, each once; found [1, 0]"),
        ([0, 7], "of 64 channels have the numbers 0 to 0; found [0, 7]"),
        ([-1], "greater than or equal to 0"),
        ([], "at least 1 item"),
        (["0"], "valid integer"),
    ],
)
def test_a_list_that_a_layer_cannot_have_is_refused(made, tmp_path, blocks, words):
    copy = edited(made, tmp_path, lambda residual: residual["layers"].update({"blocks.1.attn1.to_q": blocks}))
    with pytest.raises(PtqError) as caught:
        load_pipeline(copy)
    text = str(caught.value)
    assert words in text and "blocks.1.attn1.to_q" in text and "\n" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": {"blocks.9.attn1.to_q": [0]}}, "blocks.9.attn1.to_q, which is no quantized layer"),
        ({"block_size": 32}, "block_size"),
        ({"kind": "x"}, "kind"),
    ],
)
def test_another_rule_or_layer_is_refused(made, tmp_path, change, words):
    copy = edited(made, tmp_path, lambda residual: residual.update(change))
    with pytest.raises(PtqError) as caught:
        load_pipeline(copy)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.51, -0.01, "nan"])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UsageError, match=r"solver.residual") as caught:
        make_settings("hif4", f"solver.residual={share}")
    assert "\n" not in str(caught.value)


class TwoLayers(nn.Module):
    """An output that depends on its second Linear alone a hundred times more."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.loud = nn.Linear(256, 64, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": 0.01 * self.quiet(torch.tanh(x)) + self.loud(x)}


@torch.no_grad()
def test_a_module_gets_them_where_its_output_feels_the_noise():
    torch.manual_seed(0)
    model, batches = TwoLayers(), [{"x": torch.randn(64, 256)}]
    exact = model(**batches[0])["y"]
    report = quantize_module(model, batches, "hif4", make_settings("hif4", "solver.residual=0.25").recipe)
    of = {layer.name: layer.residual_blocks for layer in report.layers}
    assert len(of["loud"]) == 2 and of["quiet"] == () and model.loud.packed.blocks == of["loud"]
    error = float((model(**batches[0])["y"] - exact).square().sum())
    torch.manual_seed(0)
    plain = TwoLayers()
    quantize_module(plain, batches, "hif4", make_settings("hif4").recipe)
    assert error < 0.9 * float((plain(**batches[0])["y"] - exact).square().sum())
