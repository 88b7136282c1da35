"""Each variant of Wan 2.2, with random weights, from a prompt file to videos of the original and of both 4-bit formats."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ptq as ptq_package
from ptq.checkpoint.manifest import read_manifest
from ptq.cli.main import app
from ptq.known import FORMATS
from ptq.runtime import QuantLinear
from ptq.store.calibration import CalibrationSet
from ptq.wan.presets import load_preset
from ptq.wan.variants import VARIANTS

SIZE = ["--height", "32", "--width", "32", "--num-frames", "5", "--device", "cpu"]
pytestmark = pytest.mark.slow
CLIPS = sorted((Path(__file__).resolve().parents[2] / "shared").glob("data/**/*.mp4"))


def ptq(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two samples: one starts from a picture, one from the first frame of a clip (another picture where none is at hand)."""
    for seed, name in enumerate(("a.png", "b.png")):
        picture = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / name)
    second: dict[str, str] = {"image": str(tmp_path / "b.png")} if not CLIPS else {"video": str(CLIPS[0])}
    samples = [
        {"id": "one", "prompt": "a red ball rolls", "image": str(tmp_path / "a.png")},
        {"id": "two", "prompt": "a person looks up", **second},
    ]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_prompts_to_videos(random_pipelines: dict[str, Path], prompts: Path, tmp_path: Path, variant: str):
    model, kind = random_pipelines[variant], VARIANTS[variant]
    size = ["--height", "64", "--width", "64", *SIZE[4:]] if variant == "TI2V-5B" else SIZE
    records = tmp_path / "records"
    ptq("calibrate", model, "--prompts", prompts, "--out", records, *size, "--steps", 6, "--records-per-prompt", 4)
    models = {"original": model}
    for name in FORMATS:
        models[name] = tmp_path / name
        options = ["--format", name, *size[6:], "--json"]
        facts = json.loads(ptq("quantize", model, "--calibration", records, "--out", models[name], *options))
        assert facts["format"] == name
    runs, final = {}, {}
    images = ["--image-to-video"] if kind.image == "optional" else []
    for name, source in models.items():
        run = tmp_path / "runs" / name
        command = ["generate", source, "--prompts", prompts, *size, *images, "--steps", 2, "--out", run]
        summary = json.loads(ptq(*command, "--json"))
        assert (summary["done"], summary["remaining"]) == (2, 0)
        lines = [json.loads(line) for line in (run / "manifest-0of1.jsonl").read_text().splitlines()]
        assert all((line["image_sha256"] is not None) == (kind.image != "none") for line in lines)
        assert {line["flow_shift"] for line in lines} == {load_preset(variant).flow_shift}
        assert {line["guidance_scale_2"] is None for line in lines} == {len(kind.experts) == 1}
        runs[name] = [(line["unit"], line["seed"], line["latent_sha256"], line["image_sha256"]) for line in lines]
        final[name] = {line["final_latents_sha256"] for line in lines}
    # Paired: the same units from the same noise and image; and yet as many different models.
    assert all(run == runs["original"] for run in runs.values())
    assert len(set.union(*final.values())) == 2 * len(models)
    reference, candidate, out = tmp_path / "runs" / "original", tmp_path / "runs" / "hif4", tmp_path / "evaluation"
    ptq("evaluate", "--reference", reference, "--candidate", candidate, "--allow-overlap", "--out", out, "--json")
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["units"] == 2 and evaluation["candidate"]["format"] == "hif4"


def test_image_tokens_are_recorded_and_quantized(random_pipelines: dict[str, Path], prompts: Path, tmp_path: Path):
    """I2V-14B of Wan 2.1: the layers that read the image's tokens are solved from recorded image tokens."""
    model, records, out = random_pipelines["I2V-14B"], tmp_path / "records", tmp_path / "out"
    ptq("calibrate", model, "--prompts", prompts, "--out", records, *SIZE, "--steps", 2, "--records-per-prompt", 2)
    recorded = CalibrationSet(records)
    calls = [recorded.load(record) for record in recorded]
    assert all(call.encoder_hidden_states_image.shape == (1, 5, 32) for call in calls)
    cond, uncond = ([c for c, r in zip(calls, recorded, strict=True) if r.branch == b] for b in ("cond", "uncond"))
    assert not torch.equal(cond[0].encoder_hidden_states, uncond[0].encoder_hidden_states)
    assert torch.equal(cond[0].encoder_hidden_states_image, uncond[0].encoder_hidden_states_image)  # of one picture
    assert not torch.equal(cond[0].encoder_hidden_states_image, cond[1].encoder_hidden_states_image)  # of two
    ptq("quantize", model, "--calibration", records, "--format", "hif4", "--out", out, *SIZE[6:])
    manifest = read_manifest(out)
    rows = {(row.block, row.layer) for row in manifest.layers}
    assert len(rows) == 24 and {(b, f"attn2.add_{k}_proj") for b in (0, 1) for k in "kv"} < rows
    # Work of one block: nine Linears' worth of 128 x 128 reads the 8 video tokens, two the text, two the image's 5.
    block_flops = 2 * 128 * 128 * (10 * 8 + 2 * 512 + 2 * 5)
    embedders = 2 * 128 * (512 * (64 + 128) + 5 * (32 * 32 / 128 + 32) + (256 + 128 + 6 * 128) + 8 * 16 * 4)
    assert manifest.coverage.flop_share == pytest.approx(2 * block_flops / (2 * block_flops + embedders), rel=1e-12)
    block = ptq_package.load_pipeline(out).transformer.blocks[1].attn2
    assert isinstance(block.add_k_proj, QuantLinear) and isinstance(block.add_v_proj, QuantLinear)
