"""One video made by two processes is the video that one process makes; followers write nothing and end when told.

diffusers' context parallelism wants an accelerator. Here two CPU processes take part over gloo, with torch made to report
one device; the exchange of tokens and heads is the real one. The leader encodes the prompts; nobody else has a text encoder.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from children import start_child
from generation_helpers import MODEL, SETTINGS, file_digests, lines, load, make_samples, run
from typer.testing import CliRunner

from ptq.cli.main import app
from ptq.errors import UsageError
from ptq.generation import Settings, group, run_generation, sampling
from ptq.generation.group import LostGroupError, check_group, dismiss_group, follow
from ptq.generation.sampling import Sampler
from ptq.wan.encoding import TextEncoding, load_denoiser
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline

GROUP = replace(SETTINGS, context_parallel=2, save_frames=True)


def take_part(rank: int, store: Path, pipe_dir: Path, out: Path, count: int, guidance: float, answer: Path) -> None:
    """Target of a child: the leader (rank 0) or the follower of a group of two."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    settings, layout = replace(GROUP, guidance_scale=guidance), read_layout(pipe_dir)
    if rank:
        sampler = []

        def load_sampler() -> Sampler:
            sampler.append(Sampler(load_denoiser(layout, "float32"), settings))
            return sampler[0]

        follow(load_sampler)
        answer.write_text(json.dumps({"loaded": len(sampler)}))
    else:
        encoding = TextEncoding(layout, out / "state" / "embeddings", "float32", 16, settings.negative_prompt)
        samples, load = make_samples(count), partial(load_denoiser, layout, "float32")
        run_generation(load, samples, settings, out, model=MODEL, encoding=encoding)
        dismiss_group()


def make_in_group(tmp_path: Path, pipe_dir: Path, count: int, guidance: float = SETTINGS.guidance_scale) -> dict:
    """Run leader and follower to their ends; what the follower reports."""
    answer, store = tmp_path / "answer.json", tmp_path / "store"
    store.unlink(missing_ok=True)
    arguments = (store, pipe_dir, tmp_path / "run", count, guidance, answer)
    children = [start_child(take_part, rank, *arguments) for rank in (0, 1)]
    for child in children:
        child.join(240)
        assert child.exitcode == 0
    return json.loads(answer.read_text())


def test_two_processes_make_the_video_of_one(pipe_dir: Path, tmp_path: Path):
    assert make_in_group(tmp_path, pipe_dir, 2) == {"loaded": 1}
    run(pipe_dir, tmp_path / "alone", make_samples(2), replace(SETTINGS, save_frames=True))
    together, alone = lines(tmp_path / "run"), lines(tmp_path / "alone")
    assert len(together) == len(alone) == 2
    for a, b in zip(together, alone, strict=True):
        assert (a["unit"], a["latent_sha256"]) == (b["unit"], b["latent_sha256"])
        one = np.load(tmp_path / "run" / a["saved_frames"])["frames"].astype(int)
        two = np.load(tmp_path / "alone" / b["saved_frames"])["frames"].astype(int)
        assert np.abs(one - two).max() <= 1  # float32 sums in another order
    # Other settings, so the two are never mixed; and a finished run asks the followers for nothing.
    infos = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "alone")]
    assert infos[0]["digest"] != infos[1]["digest"]
    before = file_digests(tmp_path / "run")
    assert make_in_group(tmp_path, pipe_dir, 2) == {"loaded": 0}
    assert file_digests(tmp_path / "run") == before


def test_unusable_output_is_recorded_and_the_group_goes_on(pipe_dir: Path, tmp_path: Path):
    make_in_group(tmp_path, pipe_dir, 2, guidance=1e39)
    found = lines(tmp_path / "run")
    assert [line["status"] for line in found] == ["failed", "failed"]
    assert all("without --context-parallel" in line["error"] for line in found)


def test_a_failure_in_one_process_ends_the_run(pipe_dir: Path, tmp_path: Path, monkeypatch):
    """The leader cannot know where the others are: it must not go on to the next unit."""
    sent = []
    monkeypatch.setattr(group, "_send", sent.append)
    monkeypatch.setattr(sampling, "split_tokens", lambda *_: None)
    pipe = load_pipeline(pipe_dir, dtype=torch.float32)

    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("no room")

    pipe.encode_prompt = fail
    with pytest.raises(LostGroupError, match="no room"):
        run_generation(lambda: pipe, make_samples(3), GROUP, tmp_path / "run", model=MODEL)
    assert [message[0] for message in sent] == ["load", "make"]
    assert [line["status"] for line in lines(tmp_path / "run")] == ["failed"]


@pytest.mark.parametrize(
    ("environ", "device", "offload", "text"),
    [
        ({}, "cuda:0", "none", "torchrun --nproc-per-node 2"),
        ({"WORLD_SIZE": "3"}, "cuda:0", "none", "but 3 were started"),
        ({"WORLD_SIZE": "2"}, "cpu", "none", "needs a CUDA GPU"),
        ({"WORLD_SIZE": "2"}, "cuda:0", "model", "leave out --offload"),
    ],
)
def test_requests_that_cannot_work_are_refused(environ, device, offload, text):
    with pytest.raises(UsageError, match=text):
        check_group(GROUP, environ, device, offload)


def test_heads_and_tokens_must_be_shared_evenly(pipe_dir: Path):
    settings: Settings = replace(SETTINGS, context_parallel=3)
    with pytest.raises(
        UsageError, match=r"2 attention heads and this video 8 tokens; --context-parallel must divide both"
    ):
        Sampler(load(str(pipe_dir)), settings)


def test_the_command_refuses_without_its_launcher(pipe_dir: Path, tmp_path: Path):
    command = ["generate", str(pipe_dir), "--prompt", "a", "--out", str(tmp_path / "run"), "--context-parallel", "2"]
    result = CliRunner().invoke(
        app, [*command, "--device", "cpu", "--height", "32", "--width", "32", "--num-frames", "5"]
    )
    assert isinstance(result.exception, UsageError) and "torchrun" in str(result.exception)
    assert not (tmp_path / "run").exists()
