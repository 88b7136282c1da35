"""Calibration and quantization of a model with a LoRA in it are those of the merged model, and say so everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import loras
import pytest
import torch
from quantization_helpers import SIZE, edit_weights, make_settings, run
from safetensors.torch import load_file
from typer.testing import CliRunner

from ptq.calibration.prepare import make_plan, record_plan
from ptq.checkpoint.manifest import read_manifest
from ptq.checkpoint.shards import ShardSet
from ptq.cli.main import app
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.evaluation import evaluate_runs
from ptq.evaluation.runs import read_run
from ptq.prompts import read_prompts
from ptq.report import Sources
from ptq.report.facts import gather
from ptq.report.method import describe_method
from ptq.report.reproduce import reproduction
from ptq.store.calibration import CalibrationSet, read_calibration
from ptq.wan.identity import identify_model
from ptq.wan.layout import ModelLayout, read_layout
from ptq.wan.loading import load_pipeline
from ptq.wan.lora import choose_loras
from ptq.wan.merge import MergedShards

PROTECTED = {"transformer": {1: "for the test"}}
EXPERTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for each expert (for blocks and output, with biases) and prompts."""
    folder = tmp_path_factory.mktemp("loras")
    pipe = load_pipeline(model)
    for seed, expert in enumerate(EXPERTS):
        linears = loras.block_linears(getattr(pipe, expert))
        pairs = loras.factors({**linears, "proj_out": getattr(pipe, expert).proj_out}, seed=seed, std=0.05)
        biases = {
            f"transformer.{name}.lora_B.bias": torch.full((pairs[name][1].shape[0],), 0.01)
            for name in [*linears, "proj_out"]
        }
        loras.write(folder / f"{expert}.safetensors", loras.diffusers_names(pairs) | biases)
    (folder / "prompts.txt").write_text("a red ball rolls\na dog runs\n", encoding="utf-8")
    return folder


def record(layout: ModelLayout, folder: Path, out: Path, *, merge: bool) -> CalibrationSet:
    texts = [f"{folder / expert}.safetensors:0.9" if merge else None for expert in EXPERTS]
    given = SIZE | {"steps": None, "named": "lightning"}
    plan = make_plan(layout, read_prompts(folder / "prompts.txt"), given, loras=choose_loras(layout, *texts))
    assert record_plan(plan, out)["complete"]
    return CalibrationSet(out)


@pytest.fixture(scope="module")
def records(model, folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(
        read_layout(model), folder, tmp_path_factory.mktemp("merged-records") / "records", merge=True
    ).directory


@pytest.fixture(scope="module")
def checkpoint(model, records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block protected, so that merged weights stay in the checkpoint."""
    out = tmp_path_factory.mktemp("merged") / "mxfp4"
    run(model, records, out, make_settings("mxfp4", "solver.rounding=gptq", protected=PROTECTED))
    return out


@pytest.fixture(scope="module")
def saved(model, records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a tool that merges LoRAs would have saved it."""
    merged = Path(shutil.copytree(model, tmp_path_factory.mktemp("saved") / "model"))
    for expert, info in read_calibration(records / "calibration.json").lora.items():
        shards = MergedShards(model / expert, info)
        edit_weights(merged, expert, lambda tensors, s=shards: tensors.update({n: s.read(n) for n in tensors}))
    return merged


def test_records_and_codes_are_those_of_the_saved_merged_model(
    model, saved, folder, records, checkpoint, tmp_path
) -> None:
    wanted = record(read_layout(saved), folder, tmp_path / "records", merge=False)
    plain = record(read_layout(model), folder, tmp_path / "plain", merge=False)
    files = [f"records/{path.name}" for path in (records / "records").iterdir()]
    assert files and all((records / f).read_bytes() == (wanted.directory / f).read_bytes() for f in files)
    assert any((records / f).read_bytes() != (plain.directory / f).read_bytes() for f in files)
    assert len({CalibrationSet(records).digest, wanted.digest, plain.digest}) == 3
    settings = make_settings("mxfp4", "solver.rounding=gptq", protected=PROTECTED)
    run(saved, wanted.directory, tmp_path / "mxfp4", settings)
    for expert in EXPERTS:
        names = [path.name for path in (checkpoint / expert).iterdir()]
        assert len(names) > 1
        for name in names:
            assert (checkpoint / expert / name).read_bytes() == (tmp_path / "mxfp4" / expert / name).read_bytes()
    original, found = ShardSet(model / "transformer"), ShardSet(checkpoint / "transformer")
    for name in ("blocks.1.attn1.to_q.weight", "blocks.0.attn1.to_q.bias", "proj_out.weight", "proj_out.bias"):
        assert not torch.equal(original.read(name), found.read(name)), name
    assert not (checkpoint / "blocks").exists()


def test_everything_says_what_was_merged(model, folder, records, checkpoint) -> None:
    info = read_calibration(records / "calibration.json")
    assert {name: one.strength for name, one in info.lora.items()} == dict.fromkeys(EXPERTS, 0.9)
    assert info.lora["transformer"].path == str(folder / "transformer.safetensors")
    manifest = read_manifest(checkpoint)
    assert {name: (one.name, one.sha256, one.path) for name, one in manifest.loras.items()} == {
        name: (f"{name}.safetensors", one.sha256, None) for name, one in info.lora.items()
    }
    assert "transformer_2.safetensors at strength 0.9" in (checkpoint / "README.md").read_text()
    assert str(folder) not in (checkpoint / "ptq_manifest.json").read_text() + (checkpoint / "README.md").read_text()
    assert identify_model("x", checkpoint).loras == manifest.loras and identify_model("x", model).loras == {}
    preset = json.loads((checkpoint / "ptq_preset.json").read_text())
    assert [preset[key] for key in ("steps", "guidance_scale", "guidance_scale_2", "flow_shift")] == [4, 1.0, 1.0, 5.0]
    assert len(CalibrationSet(records).records) == 2 * 4


def test_records_without_a_lora_keep_their_identity(model, folder, tmp_path) -> None:
    """Directories of earlier versions continue: the entry is part of the digest only where there is one."""
    info = record(read_layout(model), folder, tmp_path / "records", merge=False).info
    assert "lora" not in info.decisive()
    raw = json.loads((tmp_path / "records/calibration.json").read_text())
    assert raw.pop("lora") == {}
    (tmp_path / "records/calibration.json").write_text(json.dumps(raw))
    again = record(read_layout(model), folder, tmp_path / "records", merge=False)
    assert again.digest == info.digest


def test_records_of_two_merges_are_not_mixed(model, folder, records, tmp_path) -> None:
    copy = Path(shutil.copytree(records, tmp_path / "records"))
    with pytest.raises(UsageError, match="made with other settings; different: lora"):
        record(read_layout(model), folder, copy, merge=False)


@pytest.mark.parametrize("change", ["missing", "changed", "moved"])
def test_quantizing_without_the_file_of_the_records(model, folder, records, tmp_path, change: str) -> None:
    copy = Path(shutil.copytree(records, tmp_path / "records"))
    elsewhere = Path(shutil.copytree(folder, tmp_path / "loras"))
    raw = json.loads((copy / "calibration.json").read_text())
    for expert in EXPERTS:
        raw["lora"][expert]["path"] = str(elsewhere / f"{expert}.safetensors")
    (copy / "calibration.json").write_text(json.dumps(raw))
    file = elsewhere / "transformer_2.safetensors"
    if change == "changed":
        loras.write(file, {name: 2 * tensor for name, tensor in load_file(file).items()})
    else:
        file.rename(copy / file.name if change == "moved" else file.with_name("x.safetensors"))
    settings = make_settings("mxfp4")
    if change == "moved":
        run(model, copy, tmp_path / "out", settings)
        return
    words = "is not there. Put the file back" if change == "missing" else "is not the LoRA that"
    with pytest.raises((PtqError, DamagedFileError), match=words):
        run(model, copy, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--lora", "missing.safetensors"], 2, "there is no file missing.safetensors"),
        (["--lora", "prompts.txt"], 1, "not a complete safetensors file"),
        (["--lora", "transformer.safetensors:nan"], 2, "the strength is nan"),
        (["--preset", "thunder"], 2, "There is no preset 'thunder'; choose one of icme2026, lightning"),
    ],
)
@pytest.mark.parametrize("command", ["calibrate", "generate"])
def test_wrong_requests_write_nothing(
    model, folder, tmp_path, monkeypatch, command: str, options: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(folder)
    arguments = [command, str(model), "--prompts", "prompts.txt", "--out", str(tmp_path / "out"), *options]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, PtqError) and error.exit_code == code
    assert words in str(error) and "\n" not in str(error)
    assert not (tmp_path / "out").exists()


def ptq(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, PtqError):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_a_distilled_model_from_generate_to_report(model, saved, folder, records, checkpoint, tmp_path, monkeypatch):
    """The checkpoint generates by what it was calibrated with; it is compared with the merged original and no other."""
    monkeypatch.chdir(folder)
    sizes = ("--height", 32, "--width", 32, "--num-frames", 9, "--max-sequence-length", 16)
    common = ("--prompts", "prompts.txt", "--device", "cpu", "--no-preflight")
    merge = ("--lora", "transformer.safetensors:0.9", "--lora-2", "transformer_2.safetensors:0.9")
    reference = ("generate", model, *common, "--preset", "lightning", *sizes)
    ptq(*reference, "--out", tmp_path / "reference", *merge)
    ptq("generate", checkpoint, *common, "--out", tmp_path / "packed")
    for name, source in (("other", model), ("saved", saved)):
        ptq("generate", source, *common, "--preset", "lightning", *sizes, "--out", tmp_path / name)
    runs = {name: read_run(tmp_path / name) for name in ("reference", "packed", "other", "saved")}
    assert runs["packed"].info.settings["steps"] == 4 and runs["packed"].info.settings["guidance_scale"] == 1.0
    latents = {name: [unit.line.final_latents_sha256 for unit in run.units.values()] for name, run in runs.items()}
    assert latents["reference"] == latents["saved"] != latents["other"]
    assert runs["reference"].info.lora == runs["packed"].info.lora == read_manifest(checkpoint).loras
    assert runs["other"].info.lora == {}

    evaluation = evaluate_runs(
        tmp_path / "reference", tmp_path / "packed", tmp_path / "evaluation", suite="core", allow_overlap=True
    )
    assert evaluation.units == 2 and set(evaluation.reference.lora) == set(EXPERTS)
    with pytest.raises(
        PtqError, match=r"merged LoRAs differ: none in .*other, transformer: transformer.safetensors at"
    ):
        evaluate_runs(tmp_path / "other", tmp_path / "packed", tmp_path / "refused", suite="core")
    with pytest.raises(PtqError, match=r"the LoRA of transformer was '.* at 0.9', now None"):
        ptq(*reference, "--out", tmp_path / "reference")

    shutil.copytree(records, tmp_path / "calibration")
    shutil.copytree(checkpoint, tmp_path / "mxfp4")
    facts = gather(Sources(tmp_path / "evaluation", tmp_path / "mxfp4"))
    steps = "\n".join(reproduction(facts).commands)
    options = "--lora transformer.safetensors:0.9 --lora-2 transformer_2.safetensors:0.9"
    assert [line.split()[1] for line in steps.splitlines() if options in line] == ["calibrate", "generate"]
    assert facts.manifest is not None
    told = {step.title: step.text for step in describe_method(facts.manifest)}
    assert "transformer_2.safetensors at strength 0.9" in told["Merged LoRA"]
