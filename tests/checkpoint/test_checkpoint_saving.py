"""A packed pipeline saved by diffusers is a checkpoint of this package again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from typer.testing import CliRunner

import ptq
from ptq.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify_files
from ptq.cli.main import app
from ptq.errors import UsageError
from ptq.store.files import read_json
from ptq.wan.loading import resolve_model


def test_a_saved_pipeline_keeps_what_lies_beside_its_weights(packed, copy_of, tmp_path: Path, generate) -> None:
    source, out = copy_of(packed["hif4"]), tmp_path / "saved"
    (source / "README.md").write_text("a model card")
    pipeline = WanPipeline.from_pretrained(source, dtype=torch.float32)
    pipeline.save_pretrained(out)
    assert (out / "README.md").read_text() == "a model card"
    assert (out / "ptq_preset.json").read_bytes() == (source / "ptq_preset.json").read_bytes()
    assert read_manifest(out).layers == read_manifest(source).layers
    configs = [read_json(path / "transformer" / "config.json")["quantization_config"] for path in (source, out)]
    assert configs[0] == configs[1] and configs[0]["residual"]["layers"]
    verify_files(out)  # digests are those of the files as saved
    assert resolve_model(str(out)).preset == resolve_model(str(source)).preset
    assert torch.equal(generate(ptq.load_pipeline(out)), generate(pipeline))
    shown = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert shown.exit_code == 0 and "hif4" in shown.stdout


def test_saving_into_its_own_directory_changes_no_companion(packed, copy_of) -> None:
    source = copy_of(packed["mxfp4"])
    before = (source / MANIFEST_FILE).read_bytes()
    ptq.load_pipeline(source).save_pretrained(source)
    assert (source / MANIFEST_FILE).read_bytes() == before


def test_pickles_are_refused_before_anything_is_written(packed, tmp_path: Path) -> None:
    pipeline = ptq.load_pipeline(packed["mxfp4"])
    for saved in (pipeline, pipeline.transformer):
        with pytest.raises(UsageError, match="safetensors only"):
            saved.save_pretrained(tmp_path / "out", safe_serialization=False)
        assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.safetensors"))


def test_other_pipelines_are_saved_as_ever(random_pipelines, packed, tmp_path: Path) -> None:
    ptq.load_pipeline(packed["mxfp4"])  # from here on the method is wrapped
    pipeline = DiffusionPipeline.from_pretrained(random_pipelines["TI2V-5B"], dtype=torch.float32)
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert list((tmp_path / "pickled").rglob("*.bin")) and not list((tmp_path / "pickled").glob("ptq_*"))


def test_packed_components_are_still_copied_and_pickled(packed) -> None:
    model = ptq.load_pipeline(packed["mxfp4"]).transformer
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.state_dict().keys() == model.state_dict().keys()
