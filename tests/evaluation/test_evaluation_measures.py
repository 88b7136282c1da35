"""Measures against scikit-image, against straightforward formulas, and on clips with known faults."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ptq.errors import DamagedFileError
from ptq.evaluation import measures
from ptq.evaluation.ssim import ssim
from ptq.evaluation.streaming import measure_clips


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def blurred(frame):
    return ((frame.astype(np.uint16) + np.roll(frame, 1, 0) + np.roll(frame, 1, 1) + np.roll(frame, (1, 1), (0, 1))) // 4).astype(np.uint8)  # fmt: skip


def reference_ssim(a, b):
    return structural_similarity(
        a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(11, 90), st.integers(11, 400), st.integers(0, 2**31), st.sampled_from(["noise", "close", "flat"]))
def test_ssim_equals_scikit_image(height, width, seed, kind):
    a = noise(seed, height, width, 3)
    if kind == "flat":
        a[: height // 2] = a[0, 0]
    b = noise(seed + 1, height, width, 3) if kind == "noise" else blurred(a)
    assert ssim(a, b) == pytest.approx(reference_ssim(a, b), abs=1e-10)


def test_ssim_of_equal_and_flat_frames():
    flat = np.full((40, 50, 3), 200, np.uint8)
    assert ssim(flat, flat) == pytest.approx(1.0, abs=1e-12)
    assert ssim(flat, flat - 1) == pytest.approx(reference_ssim(flat, flat - 1), abs=1e-9)


@pytest.mark.parametrize("shapes", [((10, 40, 3), (10, 40, 3)), ((20, 20, 3), (20, 21, 3))])
def test_ssim_refuses_what_it_cannot_compare(shapes):
    with pytest.raises(ValueError, match="11x11"):
        ssim(noise(0, *shapes[0]), noise(1, *shapes[1]))


def test_psnr_equals_scikit_image():
    a, b = noise(0, 30, 40, 3), noise(1, 30, 40, 3)
    mse, _ = measures.mean_square_and_abs(a.astype(np.int16) - b)
    assert measures.psnr_from_mse(mse) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-10)


def test_sharpness_equals_opencv():
    """cv2.Laplacian(luma, CV_64F).var() of OpenCV 5.0.0 for this image, luma rounded to bytes there."""
    y, x = np.mgrid[0:48, 0:64]
    grey = ((x * 7 + y * 13 + (x * y) % 31) % 256).astype(np.uint8)
    frame = np.repeat(grey[..., None], 3, axis=2)
    assert measures.sharpness(measures.luma(frame)) == pytest.approx(OPENCV_LAPLACIAN_VARIANCE, rel=1e-5)


OPENCV_LAPLACIAN_VARIANCE = 26006.095743391244


def test_saturation_of_known_colours():
    frame = np.zeros((2, 2, 3), np.uint8)
    frame[0, 0], frame[0, 1], frame[1, 0] = (255, 0, 0), (200, 100, 100), (90, 90, 90)
    assert measures.saturation(frame) == pytest.approx((1.0 + 0.5 + 0.0 + 0.0) / 4)


def test_clip_values_equal_plain_formulas():
    ref, cand = noise(0, 6, 24, 32, 3), noise(1, 6, 24, 32, 3)
    cand[2] = ref[2]
    found = measure_clips(iter(ref), iter(cand))
    r, c = ref.astype(float), cand.astype(float)
    dr, dc = np.diff(r, axis=0), np.diff(c, axis=0)
    assert found.reference["temporal_flickering"] == pytest.approx(
        (255 - np.abs(dr).mean((1, 2, 3)).mean()) / 255, abs=1e-12
    )
    assert found.reference["motion_energy"] == pytest.approx((dr**2).mean())
    assert found.paired["temporal_delta_mae"] == pytest.approx(np.abs(dr - dc).mean())
    assert found.paired["motion_energy_ratio"] == pytest.approx((dc**2).mean() / (dr**2).mean())
    differing = [t for t in range(6) if t != 2]
    assert found.paired["identical_frames"] == 1
    assert found.paired["psnr"] == pytest.approx(
        np.mean([peak_signal_noise_ratio(ref[t], cand[t], data_range=255) for t in differing])
    )
    assert found.paired["ssim"] == pytest.approx(np.mean([reference_ssim(ref[t], cand[t]) for t in range(6)]), abs=1e-9)


def test_stride_thins_spatial_measures_only():
    ref, cand = noise(0, 7, 24, 32, 3), noise(1, 7, 24, 32, 3)
    every, third = (measure_clips(iter(ref), iter(cand), stride=n) for n in (1, 3))
    assert third.paired["ssim"] == pytest.approx(
        np.mean([reference_ssim(ref[t], cand[t]) for t in (0, 3, 6)]), abs=1e-9
    )
    for name in ("temporal_flickering", "motion_energy", "black_frames", "frozen_frames"):
        assert third.reference[name] == every.reference[name]
    assert third.paired["psnr"] == every.paired["psnr"] and third.paired["ssim"] != every.paired["ssim"]


def test_identical_clips_have_no_psnr_and_ratio_one():
    clip = noise(0, 4, 16, 16, 3)
    found = measure_clips(iter(clip), iter(clip.copy()))
    assert found.paired["psnr"] is None and found.paired["identical_frames"] == 4
    assert found.paired["motion_energy_ratio"] == 1.0 and found.paired["ssim"] == pytest.approx(1.0)
    assert found.hashes[0] == found.hashes[1]


def test_frozen_and_black_frames_are_counted():
    clip = noise(0, 6, 32, 32, 3)
    clip[3] = clip[2]
    clip[5] = 3
    found = measure_clips(iter(clip), iter(noise(1, 6, 32, 32, 3)))
    assert (found.reference["frozen_frames"], found.reference["black_frames"]) == (1, 1)
    assert (found.candidate["frozen_frames"], found.candidate["black_frames"]) == (0, 0)


def test_one_frame_has_no_temporal_measures():
    found = measure_clips(iter(noise(0, 1, 16, 16, 3)), iter(noise(1, 1, 16, 16, 3)))
    assert found.reference["temporal_flickering"] is None and found.paired["temporal_delta_mae"] is None


@pytest.mark.parametrize("shape", [(5, 16, 16, 3), (4, 16, 18, 3)])
def test_clips_of_other_length_or_size_are_refused(shape):
    with pytest.raises(DamagedFileError, match="unit x"):
        measure_clips(iter(noise(0, 4, 16, 16, 3)), iter(noise(1, *shape)), name="unit x")


def test_latent_error_of_known_vectors():
    reference = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    noisy = reference + np.float32(0.1) * np.random.default_rng(1).normal(size=reference.shape).astype(np.float32)
    found = measures.latent_error(reference, noisy)
    r, c = reference.astype(float).ravel(), noisy.astype(float).ravel()
    relative = math.sqrt(((c - r) ** 2).sum() / (r**2).sum())
    assert found["latent_relative_l2"] == pytest.approx(relative)
    assert found["latent_snr_db"] == pytest.approx(-20 * math.log10(relative))
    assert found["latent_cosine"] == pytest.approx(r @ c / np.linalg.norm(r) / np.linalg.norm(c))
    assert measures.latent_error(reference, reference)["latent_snr_db"] is None
    with pytest.raises(ValueError, match="NaN"):
        measures.latent_error(reference, reference * np.nan)
