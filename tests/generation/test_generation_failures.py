"""Models that give NaN, black or frozen videos, and units that fail: named, recorded, retried where that can help."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from generation_helpers import MODEL, SETTINGS, file_digests, lines, make_samples, run

from ptq.errors import PtqError, UsageError
from ptq.generation import run_generation
from ptq.generation.run import MAX_FAILURES_IN_A_ROW
from ptq.wan.loading import load_pipeline
from ptq.wan.pipeline import OFFLOAD_MODES


@pytest.fixture
def pipe(pipe_dir: Path):
    torch.set_num_threads(1)
    return load_pipeline(str(pipe_dir), dtype=torch.float32)


def run_with(pipe, out: Path, count: int = 1, settings=SETTINGS, **options):
    return run_generation(lambda: pipe, make_samples(count), settings, out, model=MODEL, **options)


@pytest.mark.parametrize(
    ("expert", "layer", "value", "kind"),
    [
        ("transformer", "blocks.1.ffn.net.2", float("nan"), "NaN"),
        ("transformer", "blocks.0.attn2.to_k", float("inf"), "infinity"),
        ("transformer_2", "blocks.1.attn1.to_v", float("nan"), "NaN"),
    ],
)
def test_step_and_layer_of_a_nan_are_named(pipe, tmp_path: Path, expert: str, layer: str, value: float, kind: str):
    with torch.no_grad():
        getattr(pipe, expert).get_submodule(layer).bias[3] = value
    summary = run_with(pipe, tmp_path / "run")
    # Shift 5, 3 steps: timesteps 999, 909, 714; the boundary is 875, so the second expert's first step is the third.
    step = 1 if expert == "transformer" else 3
    text = summary.failed["world/s0/0"]
    assert f"Step {step} of 3" in text and f"in the output of {expert}.{layer} ({kind})" in text
    (line,) = lines(tmp_path / "run")  # once: another attempt would give the same
    assert (line["status"], line["error"], line["video"]) == ("failed", text, None)
    assert file_digests(tmp_path / "run") == {} and summary.remaining == 1


def test_arithmetic_between_layers_is_named_as_the_input_of_the_next(pipe, tmp_path: Path):
    with torch.no_grad():
        pipe.transformer.blocks[1].scale_shift_table[0, 2, 5] = float("nan")  # gate of the self attention
    text = run_with(pipe, tmp_path / "run").failed["world/s0/0"]
    assert "first in the input of transformer.blocks.1." in text


def test_nan_from_the_text_encoder_is_named(pipe, tmp_path: Path):
    with torch.no_grad():
        pipe.text_encoder.encoder.final_layer_norm.weight[:] = float("nan")
    text = run_with(pipe, tmp_path / "run").failed["world/s0/0"]
    assert "the input encoder_hidden_states of transformer was not finite already" in text


def test_nan_from_the_scheduler_is_not_blamed_on_a_layer(pipe, tmp_path: Path):
    text = run_with(pipe, tmp_path / "run", settings=replace(SETTINGS, guidance_scale=1e39)).failed["world/s0/0"]
    assert "guidance or the scheduler" in text


def test_nan_from_the_vae_black_and_frozen_videos_are_refused(pipe, tmp_path: Path):
    decode = pipe.vae.decode

    def change(function):
        pipe.vae.decode = lambda *a, **k: (function(decode(*a, **k)[0]),)

    for name, function, text in (
        ("nan", lambda video: video * float("nan"), "VAE"),
        ("black", lambda video: torch.full_like(video, -1.0), "black after step 3"),
        ("frozen", lambda video: video[:, :, :1].expand_as(video), "frozen after step 3"),
    ):
        change(function)
        assert text in run_with(pipe, tmp_path / name).failed["world/s0/0"]
        assert file_digests(tmp_path / name) == {}
    change(lambda video: video)
    assert run_with(pipe, tmp_path / "good").done == 1


def test_a_passing_failure_is_retried_and_the_video_is_the_same(pipe, whole_run: Path, tmp_path: Path):
    encode, calls = pipe.encode_prompt, []

    def fail_once(*args, **kwargs):
        calls.append(kwargs.get("prompt"))
        if len(calls) == 2:
            raise RuntimeError("a passing trouble")
        return encode(*args, **kwargs)

    pipe.encode_prompt = fail_once
    summary = run_with(pipe, tmp_path / "run", 4)
    assert (summary.done, summary.failed, summary.remaining) == (4, {}, 0)
    assert [line["status"] for line in lines(tmp_path / "run")] == ["done", "failed", "done", "done", "done"]
    assert lines(tmp_path / "run")[1]["error"] == "RuntimeError: a passing trouble"
    assert file_digests(tmp_path / "run") == file_digests(whole_run)


def test_failures_are_counted_and_made_up_for_by_the_next_run(pipe, pipe_dir: Path, whole_run: Path, tmp_path: Path):
    encode, attempts = pipe.encode_prompt, []

    def fail_for_two(prompt=None, **kwargs):
        attempts.append(prompt)
        if prompt in ("a red ball number 1", "a red ball number 2"):
            raise RuntimeError("no such luck")
        return encode(prompt=prompt, **kwargs)

    pipe.encode_prompt = fail_for_two
    summary = run_with(pipe, tmp_path / "run", 4, retries=2)
    assert (summary.done, summary.remaining, len(attempts)) == (2, 2, 2 + 2 * 3)
    assert set(summary.failed) == {"world/s1/0", "world/s2/0"}
    assert run(pipe_dir, tmp_path / "run", make_samples(4)).done == 2
    assert file_digests(tmp_path / "run") == file_digests(whole_run)


def test_a_broken_checkpoint_stops_the_run_early(pipe, tmp_path: Path):
    with torch.no_grad():
        pipe.transformer.patch_embedding.weight[:] = float("nan")
    summary = run_with(pipe, tmp_path / "run", 12, settings=replace(SETTINGS, steps=1))
    assert len(summary.failed) == MAX_FAILURES_IN_A_ROW
    assert summary.not_started == 12 - MAX_FAILURES_IN_A_ROW and summary.remaining == 12


def test_programming_errors_are_not_taken_for_failed_units(pipe, tmp_path: Path):
    pipe.encode_prompt = None
    with pytest.raises(TypeError):
        run_with(pipe, tmp_path / "run")
    assert lines(tmp_path / "run") == [] and not list((tmp_path / "run" / "state").glob("*.claim"))


def test_requests_that_contradict_the_machine_or_the_model(pipe, tmp_path: Path):
    with pytest.raises(UsageError, match="without a GPU use none"):
        run_with(pipe, tmp_path / "a", offload="model")
    with pytest.raises(UsageError, match="--offload must be one of"):
        run_with(pipe, tmp_path / "b", offload="some")
    pipe.register_to_config(boundary_ratio=None)
    with pytest.raises(UsageError, match="one expert"):
        run_with(pipe, tmp_path / "c")


def test_a_lost_gpu_ends_the_run(pipe, tmp_path: Path):
    def lose(*args, **kwargs):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    pipe.encode_prompt = lose
    with pytest.raises(PtqError, match="stopped working"):
        run_with(pipe, tmp_path / "run", 3)
    assert [line["status"] for line in lines(tmp_path / "run")] == ["failed"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", OFFLOAD_MODES)
def test_offload_on_a_gpu_gives_the_same_frames_twice(pipe_dir: Path, tmp_path: Path, offload: str):
    settings = replace(SETTINGS, dtype="bfloat16", save_frames=True)
    found = []
    for name in ("a", "b"):
        pipe = load_pipeline(str(pipe_dir), dtype=torch.bfloat16)
        assert run_with(pipe, tmp_path / name, 1, settings, device="cuda", offload=offload).done == 1
        (line,) = lines(tmp_path / name)
        assert line["peak_memory_bytes"] > 0
        found.append(np.load(tmp_path / name / line["saved_frames"])["frames"])
    assert np.array_equal(*found)
