"""Another variant costs an entry and a preset: shown with one that does not exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_model import make_random_pipeline

import ptq.wan.presets
from ptq.checkpoint.shards import ShardSet
from ptq.store.calibration import DenoiserCall
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline
from ptq.wan.presets import load_preset
from ptq.wan.replay import ExpertReplay, run_block
from ptq.wan.variants import VARIANTS, Variant

# Two experts that read image tokens: a mixture that no release has.
NEW = Variant("I2V-A99B", "Wan 9", ("nobody/Wan9",), "required", boundary_ratio=0.5, image_dim=1280, latent_channels=8)


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry, and its preset: what another variant takes."""
    monkeypatch.setitem(VARIANTS, NEW.name, NEW)
    folder = tmp_path / "configs" / "models"
    folder.mkdir(parents=True)
    preset = {**load_preset("I2V-A14B").model_dump(), "variant": NEW.name, "hub_id": NEW.hub_ids[0], "flow_shift": 7.0}
    (folder / "i2v-a99b.yaml").write_text(json.dumps(preset))  # JSON is YAML
    monkeypatch.setattr(ptq.wan.presets, "CONFIGS", tmp_path / "configs")


def test_an_entry_and_a_preset_make_a_variant(configs: None, tmp_path: Path) -> None:
    path = make_random_pipeline(tmp_path / "model", NEW.name, layers=1, width=64)
    assert json.loads((path / "ptq_preset.json").read_text())["flow_shift"] == 7.0
    (path / "ptq_preset.json").unlink()
    layout = read_layout(path)
    assert layout.variant is NEW and layout.preset == load_preset(NEW.name) and layout.needs_image
    assert len(layout.linear_shapes("transformer_2")) == 12 and layout.experts["transformer"]["in_channels"] == 20
    call = DenoiserCall(
        torch.randn(1, 20, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 512, 64), torch.randn(1, 5, 32)
    )
    replay = ExpertReplay(ShardSet(path / "transformer_2"), layout.experts["transformer_2"])
    hidden, context = replay.head("call", call)
    found = replay.tail(run_block(replay.load_block(0), hidden, context), call)
    with torch.no_grad():
        assert torch.equal(found, load_pipeline(path).transformer_2(**call._asdict(), return_dict=False)[0])
