"""The model card in a packed checkpoint: what hubs read, the verdict in it, and what somebody else wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ptq.checkpoint.manifest import CARD_FILE, MANIFEST_FILE, read_manifest, verify_files
from ptq.cli.main import app
from ptq.quantization.assemble import copy_components
from ptq.store.files import read_json, sha256_file, write_json
from ptq.wan.card import is_ours, model_card, write_card
from ptq.wan.layout import read_layout


def front_matter(card: str) -> dict:
    _, block, _ = card.split("---\n", 2)
    return yaml.safe_load(block)


def test_a_checkpoint_has_a_card_that_hubs_read(packed) -> None:
    directory = packed["hif4"]
    card, manifest = (directory / CARD_FILE).read_text(), read_manifest(directory)
    head = front_matter(card)
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-video"
    assert "w4a4" in head["tags"] and head["license"] == "apache-2.0"
    assert "base_model" not in head  # a random model is on no hub
    assert f"{manifest.coverage.parameter_share:.2%}" in card and "Not yet" in card
    assert CARD_FILE not in manifest.files and is_ours(card.encode())
    assert f"| residual blocks | {manifest.coverage.residual_share:.2%} more products |" in card
    assert "two 4-bit words" in card and "residual" not in (packed["mxfp4"] / CARD_FILE).read_text()
    verify_files(directory)


def test_a_hub_model_is_named_as_base(packed) -> None:
    made = read_manifest(packed["mxfp4"])
    base = {**made.base_model, "hub_id": "Wan-AI/Wan2.2-I2V-A14B-Diffusers"}
    manifest = made.model_copy(update={"variant": "I2V-A14B", "base_model": base})
    card = model_card(manifest)
    head = front_matter(card)
    assert head["base_model"] == "Wan-AI/Wan2.2-I2V-A14B-Diffusers" and head["base_model_relation"] == "quantized"
    assert head["pipeline_tag"] == "image-to-video" and "WanImageToVideoPipeline.from_pretrained" in card
    assert "# Wan2.2-I2V-A14B-Diffusers in W4A4 MXFP4" in card


def test_report_writes_the_verdict_into_it(copy_job, tmp_path) -> None:
    card = copy_job.checkpoint / CARD_FILE
    before = sha256_file(copy_job.checkpoint / MANIFEST_FILE)
    result = CliRunner().invoke(app, ["report", str(copy_job.evaluation), "--html", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    evaluation = read_json(copy_job.evaluation / "evaluation.json")
    text = card.read_text()
    assert f"Verdict: **{evaluation['verdict']}**" in text and "Not yet" not in text and is_ours(text.encode())
    assert all(f"| {name} |" in text for name in evaluation["dimensions"])
    assert sha256_file(copy_job.checkpoint / MANIFEST_FILE) == before


def test_an_edited_card_is_kept(copy_job, tmp_path) -> None:
    card = copy_job.checkpoint / CARD_FILE
    card.write_text(card.read_text() + "My own words.\n")
    edited = card.read_text()
    result = CliRunner().invoke(app, ["report", str(copy_job.evaluation), "--html", str(tmp_path / "r.html")])
    assert result.exit_code == 0 and card.read_text() == edited


@pytest.mark.parametrize("link", [False, True])
def test_the_base_models_own_card_is_neither_taken_nor_written_over(random_pipelines, packed, tmp_path, link) -> None:
    model = Path(shutil.copytree(random_pipelines["TI2V-5B"], tmp_path / "model"))
    (model / CARD_FILE).write_text("the base model's")
    target = tmp_path / "target"
    target.mkdir()
    layout = read_layout(model)
    copy_components(layout, target, layout.preset, link=link)
    assert (target / "model_index.json").exists()
    assert write_card(target, read_manifest(packed["mxfp4"])) and is_ours((target / CARD_FILE).read_bytes())
    assert (model / CARD_FILE).read_text() == "the base model's"


def test_a_checkpoint_of_before_there_was_a_card_verifies(copy_of, packed) -> None:
    """Its manifest lists the base model's README.md as one of its files."""
    directory: Path = copy_of(packed["hif4"])
    manifest = read_json(directory / MANIFEST_FILE)
    (directory / CARD_FILE).write_text("the base model's")
    manifest["files"][CARD_FILE] = sha256_file(directory / CARD_FILE)
    write_json(directory / MANIFEST_FILE, manifest)
    verify_files(directory)
