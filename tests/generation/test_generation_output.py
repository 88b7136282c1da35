"""What a unit's files hold: equal to the pipeline itself, to the contract, and to themselves wherever they are made."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from generation_helpers import SETTINGS, file_digests, lines, load, make_samples, run
from PIL import Image
from random_model import make_random_pipeline
from safetensors.numpy import load_file

from ptq.errors import DamagedFileError, UsageError
from ptq.generation.video import encode_video, verify_video, write_video
from ptq.prompts import MediaRef, Sample, unit_seed


def call_pipeline(pipe, prompt: str, seed: int, settings=SETTINGS, **arguments):
    """diffusers' own __call__ with a CPU generator: the reference for latents and frames."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=settings.flow_shift)
    return pipe(
        prompt=prompt,
        negative_prompt=settings.negative_prompt,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance_scale_2=settings.guidance_scale_2,
        max_sequence_length=settings.max_sequence_length,
        generator=torch.Generator().manual_seed(seed),
        **arguments,
    ).frames


def test_files_equal_the_pipeline_called_directly(pipe_dir: Path, tmp_path: Path):
    settings = replace(SETTINGS, save_frames=True)
    run(pipe_dir, tmp_path / "run", make_samples(1), settings)
    (line,) = lines(tmp_path / "run")
    pipe = load(str(pipe_dir))
    latents = call_pipeline(pipe, "a red ball number 0", line["seed"], output_type="latent")[0].numpy()
    saved = load_file(tmp_path / "run" / line["final_latents"])["latents"]
    assert saved.dtype == np.float32 and np.array_equal(saved, latents)
    video = call_pipeline(pipe, "a red ball number 0", line["seed"], output_type="np")[0]
    frames = np.load(tmp_path / "run" / line["saved_frames"])["frames"]
    assert frames.dtype == np.uint8 and np.array_equal(frames, (video * 255).round().astype(np.uint8))


def test_manifest_line_and_run_json_follow_the_contract(whole_run: Path):
    contract = {
        *(
            "unit",
            "dataset",
            "sample_id",
            "k",
            "prompt",
            "score_prompt",
            "image",
            "image_sha256",
            "seed",
            "latent_sha256",
        ),
        *("width", "height", "frames", "fps", "steps", "flow_shift", "guidance_scale", "guidance_scale_2", "device"),
        *("checkpoint_digest", "seconds", "peak_memory_bytes", "video", "video_sha256", "final_latents"),
        *("final_latents_sha256", "saved_frames", "status", "error"),
    }
    for index, line in enumerate(lines(whole_run)):
        assert contract <= set(line)
        assert (line["unit"], line["status"], line["error"]) == (f"world/s{index}/0", "done", None)
        assert (line["prompt"], line["score_prompt"]) == (f"a red ball number {index}", f"ball {index}")
        assert line["seed"] == unit_seed(7, "world", f"s{index}", 0)
        noise = torch.randn((16, 2, 4, 4), generator=torch.Generator().manual_seed(line["seed"]))
        assert line["latent_sha256"] == hashlib.sha256(noise.numpy().tobytes()).hexdigest()
        for key in ("video", "final_latents"):
            assert line[f"{key}_sha256"] == hashlib.sha256((whole_run / line[key]).read_bytes()).hexdigest()
        assert line["peak_memory_bytes"] > 1e6 and line["seconds"] > 0 and line["saved_frames"] is None
    info = json.loads((whole_run / "run.json").read_text())
    assert info["checkpoint"] == {"digest": "d" * 64, "format": None} and info["settings"]["steps"] == 3
    assert info["plan"]["units"] == 4 and info["versions"]["torch"] == importlib.metadata.version("torch")
    assert sorted(p.name for p in (whole_run / "videos").iterdir()) == [f"s{i}-0.mp4" for i in range(4)]


def test_the_evaluation_reader_accepts_the_directory(whole_run: Path):
    from ptq.evaluation.frames import iterate_video
    from ptq.evaluation.runs import pair_runs, read_run, verify_video

    found = read_run(whole_run)
    assert len(pair_runs(found, found).pairs) == 4 and not found.unusable
    assert found.info.checkpoint.digest == "d" * 64
    for unit in found.units.values():
        verify_video(unit)
        assert len(list(iterate_video(unit.video))) == 5


def test_seed_and_settings_change_the_video(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    reference = lines(whole_run)[0]
    for name, change in (("seed", {"seed": 8}), ("shift", {"flow_shift": 3.0}), ("cfg2", {"guidance_scale_2": 4.0})):
        run(pipe_dir, tmp_path / name, make_samples(1), replace(SETTINGS, **change))
        (line,) = lines(tmp_path / name)
        assert line["final_latents_sha256"] != reference["final_latents_sha256"]
        assert (line["latent_sha256"] == reference["latent_sha256"]) == (name != "seed")


@pytest.mark.parametrize(
    "change", [{"height": 40}, {"num_frames": 6}, {"image_to_video": True}, {"attention_backend": "nonsense"}]
)
def test_settings_that_do_not_fit_the_model_are_refused(pipe_dir: Path, tmp_path: Path, change):
    with pytest.raises(UsageError):
        run(pipe_dir, tmp_path / "run", make_samples(1), replace(SETTINGS, **change))
    assert not list(tmp_path.rglob("*.mp4")) and lines(tmp_path / "run") == []


@pytest.mark.parametrize("variant", ["I2V-A14B", "TI2V-5B"])
def test_image_to_video(tmp_path: Path, variant: str):
    model = make_random_pipeline(tmp_path / "model", variant, layers=1, width=64)
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "one.png")
    Image.fromarray(picture[::-1]).save(tmp_path / "two.png")
    settings = replace(SETTINGS, image_to_video=True, steps=2)
    if variant == "TI2V-5B":
        settings = replace(settings, guidance_scale_2=None, height=64, width=64)
    results = {}
    for name in ("one", "two"):
        run(model, tmp_path / name, make_samples(1, tmp_path / f"{name}.png"), settings)
        (results[name],) = lines(tmp_path / name)
    one, two = results["one"], results["two"]
    assert one["latent_sha256"] == two["latent_sha256"] and one["image_sha256"] != two["image_sha256"]
    assert one["final_latents_sha256"] != two["final_latents_sha256"] and one["image"] == str(tmp_path / "one.png")
    from PIL import ImageOps

    size = (settings.width, settings.height)
    fitted = ImageOps.fit(Image.fromarray(picture), size, Image.Resampling.LANCZOS)
    assert one["image_sha256"] == hashlib.sha256(fitted.tobytes()).hexdigest()
    if variant == "I2V-A14B":
        expected = call_pipeline(
            load(str(model)), "a red ball number 0", one["seed"], settings, image=fitted, output_type="latent"
        )
        assert np.array_equal(load_file(tmp_path / "one" / one["final_latents"])["latents"], expected[0].numpy())
    # The picture disappears: a clear failure of the unit, and the video made from it stays.
    missing = Sample("world", "gone", "p", "p", MediaRef("image", "gone.png", resolved=tmp_path / "gone.png"))
    summary = run(model, tmp_path / "one", [*make_samples(1, tmp_path / "one.png"), missing], settings, retries=0)
    assert summary.kept == 1 and "gone.png" in summary.failed["world/gone/0"]


def test_long_ids_and_repetitions_get_their_own_files(pipe_dir: Path, tmp_path: Path):
    caption = "A cat/dog: “walks” " + "very slowly " * 150
    samples = [Sample("world", caption + end, "a cat", "a cat") for end in ("a", "b")]
    assert run(pipe_dir, tmp_path / "run", samples, replace(SETTINGS, steps=1), samples_per_prompt=2).done == 4
    found = lines(tmp_path / "run")
    assert len({line["video"] for line in found}) == 4 == len({line["seed"] for line in found})
    assert len(file_digests(tmp_path / "run")) == 8


def make_clip() -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    frames = [np.stack([(x * 3 + 5 * t) % 256, (y * 5) % 256, (x + y + 9 * t) % 256], -1) for t in range(9)]
    return np.asarray(frames, dtype=np.uint8)


def test_video_is_untagged_h264_and_close_to_the_frames(tmp_path: Path):
    clip = make_clip()
    data = encode_video(clip, 16)
    assert data == encode_video(clip.copy(), 16)
    path = tmp_path / "a.mp4"
    write_video(path, data, 9, 48, 64)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (stream.codec.name, context.pix_fmt, stream.average_rate, stream.frames) == ("h264", "yuv420p", 16, 9)
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (2, 2, 2, 0)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    luma = np.array([0.299, 0.587, 0.114])
    error = ((decoded @ luma - clip @ luma) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 35
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_the_encoder_reads_no_memory_it_did_not_write():
    # glibc fills fresh memory with the complement of this byte; an encoder that reads it would give other bytes.
    program = (
        "import hashlib, numpy as np; from ptq.generation.video import encode_video;"
        "y, x = np.mgrid[:48, :64];"
        "clip = [np.stack([x * 3 + 5 * t, y * 5, x + y + 9 * t], -1) % 256 for t in range(9)];"
        "print(hashlib.sha256(encode_video(np.asarray(clip, dtype=np.uint8), 16)).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "MALLOC_PERTURB_": str(byte)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for byte in (1, 85, 170, 254)
    }
    assert digests == {hashlib.sha256(encode_video(make_clip(), 16)).hexdigest() + "\n"}


@pytest.mark.parametrize("damage", ["truncated", "wrong count", "not a video"])
def test_a_video_that_does_not_decode_back_gets_no_name(tmp_path: Path, damage: str):
    data, count = encode_video(make_clip(), 16), 9
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "wrong count":
        count = 10
    else:
        data = b"no video at all" * 100
    with pytest.raises(DamagedFileError):
        write_video(tmp_path / "a.mp4", data, count, 48, 64)
    assert list(tmp_path.iterdir()) == []


def test_verification_sees_another_size(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(encode_video(make_clip(), 16))
    verify_video(tmp_path / "a.mp4", 9, 48, 64)
    with pytest.raises(DamagedFileError, match="expected"):
        verify_video(tmp_path / "a.mp4", 9, 64, 48)
