"""Frame streams: equality with OpenCV and VBench on a recorded clip, saved arrays, damaged files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ptq.errors import DamagedFileError
from ptq.evaluation.frames import SAVED, VIDEO, choose_source, frames_of, iterate_saved, iterate_video
from ptq.evaluation.runs import Unit
from ptq.evaluation.streaming import measure_clips
from ptq.store.files import sha256_file
from ptq.store.run_manifest import ManifestLine

CLIP = Path(__file__).parent / "data" / "drifting.mp4"
#: SHA-256 of the clip's RGB frames as OpenCV 4.14.0 decodes them (BGR reversed).
OPENCV_FRAMES = "12461ce3be7022bd281405889cf67b2a0f65aa7797142e737de4de541ee65888"
#: vbench 0.1.5, temporal_flickering.cal_score(clip), with OpenCV 4.14.0.
VBENCH_FLICKERING = 0.9398844662834617


def test_decoding_equals_opencv():
    frames = np.stack(list(iterate_video(CLIP)))
    assert frames.shape == (17, 64, 96, 3) and frames.dtype == np.uint8
    assert hashlib.sha256(frames.tobytes()).hexdigest() == OPENCV_FRAMES


def test_temporal_flickering_equals_vbench():
    found = measure_clips(iterate_video(CLIP), iterate_video(CLIP))
    assert found.reference["temporal_flickering"] == pytest.approx(VBENCH_FLICKERING, abs=4e-9)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_saved_frames_stream_back(tmp_path, save):
    frames = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
    save(tmp_path / "clip.npz", frames=frames)
    np.testing.assert_array_equal(np.stack(list(iterate_saved(tmp_path / "clip.npz"))), frames)


@pytest.mark.parametrize(
    "arrays",
    [{"other": np.zeros((2, 4, 4, 3), np.uint8)}, {"frames": np.zeros((2, 4, 4, 3))},
     {"frames": np.zeros((4, 4, 3), np.uint8)}, {"frames": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}],
)  # fmt: skip
def test_other_arrays_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "clip.npz", **arrays)
    with pytest.raises(DamagedFileError, match=r"clip\.npz"):
        list(iterate_saved(tmp_path / "clip.npz"))


@pytest.mark.parametrize("keep", [0.5, 0.97, 0.0])
def test_truncated_files_are_refused(tmp_path, keep):
    np.savez(tmp_path / "clip.npz", frames=np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    for name, data, read in (
        ("a.npz", (tmp_path / "clip.npz").read_bytes(), iterate_saved), ("a.mp4", CLIP.read_bytes(), iterate_video)
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data[: int(keep * len(data))])
        with pytest.raises(DamagedFileError, match=name):
            list(read(tmp_path / name))


def unit(directory: Path, **record) -> Unit:
    values = {**dict.fromkeys(("sample_id", "prompt", "score_prompt", "latent_sha256"), "x"), "seed": 1}
    values["video_sha256"] = sha256_file(directory / "clip.mp4")
    values |= {"k": 0, "width": 96, "height": 64, "frames": 17, "video": "clip.mp4", **record}
    return Unit(ManifestLine(unit="d/x/0", status="done", **values), directory)


def test_both_runs_need_saved_frames_for_them_to_be_used(tmp_path):
    np.savez(tmp_path / "clip.npz", frames=np.zeros((17, 64, 96, 3), np.uint8))
    (tmp_path / "clip.mp4").write_bytes(CLIP.read_bytes())
    digest = sha256_file(tmp_path / "clip.npz")
    saved, plain = unit(tmp_path, saved_frames="clip.npz", saved_frames_sha256=digest), unit(tmp_path)
    assert choose_source(saved, saved) == SAVED
    assert choose_source(saved, plain) == choose_source(plain, saved) == VIDEO
    assert choose_source(saved, unit(tmp_path, saved_frames="clip.npz")) == VIDEO  # of an earlier version: no digest
    assert not next(frames_of(saved, SAVED)).any()
    assert next(frames_of(saved, VIDEO)).shape == (64, 96, 3)


def test_frame_count_of_the_manifest_is_checked(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(CLIP.read_bytes())
    with pytest.raises(DamagedFileError, match=r"holds 17 frames.*says 21"):
        list(frames_of(unit(tmp_path, frames=21), VIDEO))
