"""Each variant of Wan 2.2, with random weights, from a prompt file to videos of the original and of both 4-bit formats."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ptq.cli.main import app

SIZE = ["--height", "32", "--width", "32", "--num-frames", "5", "--device", "cpu"]
CLIPS = sorted((Path(__file__).resolve().parents[2] / "shared").glob("data/**/*.mp4"))


def ptq(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two samples: one starts from a picture, one from the first frame of a clip (a real one where it is at hand)."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    second: dict[str, str] = {"image": str(tmp_path / "a.png")} if not CLIPS else {"video": str(CLIPS[0])}
    samples = [
        {"id": "one", "prompt": "a red ball rolls", "image": str(tmp_path / "a.png")},
        {"id": "two", "prompt": "a person looks up", **second},
    ]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


@pytest.mark.parametrize("variant", ["T2V-A14B", "I2V-A14B", "TI2V-5B"])
def test_from_prompts_to_videos(random_pipelines: dict[str, Path], prompts: Path, tmp_path: Path, variant: str):
    model, records = random_pipelines[variant], tmp_path / "records"
    size = ["--height", "64", "--width", "64", *SIZE[4:]] if variant == "TI2V-5B" else SIZE
    ptq("calibrate", model, "--prompts", prompts, "--out", records, *size, "--steps", 6, "--records-per-prompt", 4)
    images = ["--image-to-video"] if variant == "TI2V-5B" else []
    for format_name in ("hif4", "mxfp4"):
        packed = tmp_path / format_name
        facts = json.loads(
            ptq(
                "quantize",
                model,
                "--calibration",
                records,
                "--format",
                format_name,
                "--out",
                packed,
                *size[6:],
                "--json",
            )
        )
        assert facts["format"] == format_name
    digests = []
    for name, source in (("original", model), ("hif4", tmp_path / "hif4"), ("mxfp4", tmp_path / "mxfp4")):
        command = [
            "generate",
            source,
            "--prompts",
            prompts,
            *size,
            *images,
            "--steps",
            2,
            "--out",
            tmp_path / "runs" / name,
        ]
        summary = json.loads(ptq(*command, "--json"))
        assert (summary["done"], summary["remaining"]) == (2, 0)
        lines = [
            json.loads(line) for line in (tmp_path / "runs" / name / "manifest-0of1.jsonl").read_text().splitlines()
        ]
        assert all((line["image_sha256"] is not None) == (variant != "T2V-A14B") for line in lines)
        digests.append([(line["unit"], line["seed"], line["latent_sha256"], line["image_sha256"]) for line in lines])
        final = {line["final_latents_sha256"] for line in lines}
        assert len(final) == 2
        digests[-1].append(final)
    # Paired: the same units from the same noise and image; and yet three different models.
    assert digests[0][:-1] == digests[1][:-1] == digests[2][:-1]
    assert not digests[0][-1] & digests[1][-1] and not digests[1][-1] & digests[2][-1]
