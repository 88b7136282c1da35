"""What is measured, or reused, is what was made: files and earlier results are compared with their digests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import edit_manifest, evaluate_runs, make_run, moving_noise

from ptq.errors import DamagedFileError
from ptq.store.evaluation import read_evaluation

CLIPS = {f"set/{name}/0": moving_noise(5, 32, 48, seed) for seed, name in enumerate("ab")}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    def latents(name: str) -> np.ndarray:
        return np.full((2, 2, 2, 2), len(name), np.float32)

    worse = {name: frames[::-1].copy() for name, frames in CLIPS.items()}
    made = ((name, clips) for name, clips in (("ref", CLIPS), ("cand", worse)))
    ref, cand = (make_run(tmp_path / name, clips, latents=latents, save_frames=True) for name, clips in made)
    return ref, cand


@pytest.mark.parametrize("name", ["frames/set_a-0.npz", "latents/set_a-0.safetensors", "videos/set_a-0.mp4"])
@pytest.mark.parametrize("measured", [False, True])
def test_a_file_of_the_other_run_is_noticed(tmp_path: Path, runs: tuple[Path, Path], name: str, measured: bool) -> None:
    """Also where an earlier evaluation has the numbers already."""
    if measured:
        evaluate_runs(*runs, tmp_path / "out")
    if name.startswith("latents"):
        (runs[1] / name).write_bytes((runs[1] / name).read_bytes()[:-1] + b"\x01")
    else:
        shutil.copy(runs[0] / name, runs[1] / name)
    with pytest.raises(DamagedFileError, match=rf"cand/{name} is not the file.*sha256"):
        evaluate_runs(*runs, tmp_path / "out")


def test_edited_results_are_measured_again(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    first = evaluate_runs(*runs, tmp_path / "out")
    path = tmp_path / "out" / "units.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[0]["candidate"]["sharpness"] = 1e6
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DamagedFileError, match=r"units\.jsonl was changed"):
        read_evaluation(tmp_path / "out")
    assert evaluate_runs(*runs, tmp_path / "out") == first


def test_files_of_an_earlier_version_without_digests_are_left_out_aloud(
    tmp_path: Path, runs: tuple[Path, Path]
) -> None:
    whole = evaluate_runs(*runs, tmp_path / "whole")
    keys = ("saved_frames_sha256", "final_latents_sha256")
    edit_manifest(runs[1], lambda line: {key: value for key, value in line.items() if key not in keys})
    found = evaluate_runs(*runs, tmp_path / "out")
    assert whole["sources"] == {"saved frames": 2} and found["sources"] == {"decoded video": 2}
    assert "latent_cosine" in whole["paired"] and "latent_cosine" not in found["paired"]
    for key in ("saved_frames", "final_latents"):
        assert any(f"2 units of the candidate have {key} without a digest" in text for text in found["warnings"])
