"""The tiny world: determinism, the grammar and its inverse, the split, and the detectors on ground truth."""

from __future__ import annotations

import numpy as np
import pytest

from ptq.tiny import shapes
from ptq.tiny.detect import adherence, detect, object_mask
from ptq.tiny.grammar import MEANINGS, NEUTRAL, calibration_prompts, held_out_prompts, parse_prompt, prompt_for
from ptq.tiny.world import Scene, held_out_scenes, render, train_scenes

UNITS = 400
SCENES = train_scenes() + held_out_scenes()


def sample_scene(rng: np.random.Generator | int) -> Scene:
    return SCENES[int(np.random.default_rng(rng).integers(len(SCENES)))]


@pytest.fixture(scope="module")
def rendered() -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng) for _ in range(UNITS)]
    return [(scene, render(scene, i)) for i, scene in enumerate(scenes)]


def test_render_is_deterministic_and_shaped() -> None:
    scene = sample_scene(3)
    first, again, other = render(scene, 11), render(scene, 11), render(scene, 12)
    assert first.shape == (9, 64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert render(scene, 1, num_frames=17, height=128, width=96).shape == (17, 128, 96, 3)


def test_render_known_pixels() -> None:
    """Fixed numbers, so that a changed renderer cannot pass for the one the weights were trained on."""
    frames = render(Scene("triangle", "red", "right", "black", "large"), 0)
    red = (frames == np.array([220, 30, 30])).all(-1)
    black = (frames == 20).all(-1)
    assert red[0].sum() > 350 and black[0].sum() > 3000
    columns = [np.flatnonzero(r.any(0)).mean() for r in red]
    steps = np.diff(columns)
    assert steps.min() >= 1.0 and steps.max() <= 4.0
    rows = [np.flatnonzero(r.any(1)).mean() for r in red]
    assert np.ptp(rows) <= 0.5


def test_objects_stay_inside() -> None:
    for i, scene in enumerate(SCENES):
        mask = object_mask(render(scene, i, num_frames=3))
        edge = max(mask[:, 0].max(), mask[:, -1].max(), mask[:, :, 0].max(), mask[:, :, -1].max())
        assert edge < 0.7, scene


def test_shapes_have_like_areas_and_centres() -> None:
    areas = [shapes.unit_area(name) for name in shapes.SHAPES]
    assert max(areas) / min(areas) < 1.12
    grid = np.arange(64) + 0.5
    for name in shapes.SHAPES:
        cover = shapes.coverage(name, 30.0, 33.0, 12.5, 64, 64)
        centre = (cover.sum(0) @ grid / cover.sum(), cover.sum(1) @ grid / cover.sum())
        assert centre == pytest.approx((30.0, 33.0), abs=0.15), name


def test_scene_rejects_unknown_values() -> None:
    with pytest.raises(ValueError, match="shape 'blob' is not in the tiny world"):
        Scene("blob", "red", "left", "black", "small")
    with pytest.raises(ValueError, match="no small ring"):
        Scene("ring", "red", "left", "black", "small")


def test_grammar_inverse_for_every_scene() -> None:
    known = NEUTRAL.union(*MEANINGS.values())
    for scene in SCENES:
        for seed in range(4):
            prompt = prompt_for(scene, seed)
            assert parse_prompt(prompt) == scene, prompt
            assert set(prompt.replace(",", "").split()) <= known
            assert len(prompt.split()) <= 20
    assert prompt_for(sample_scene(1), 4) == prompt_for(sample_scene(1), 4)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a small red blob moves left on a black background", "does not know the word 'blob'"),
        ("a small red circle moves left", "names no background"),
        ("a small red blue circle moves left on a black background", "names more than one colour"),
        ("a small red circle moves on a black background", "names no direction"),
        ("a small red circle moves left and right on a black background", "more than one direction"),
    ],
)
def test_parse_errors(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt)


def test_prompt_sets_are_disjoint_and_stable() -> None:
    held, calib = held_out_prompts(180), calibration_prompts(180)
    assert held == held_out_prompts(180) and held[:20] == held_out_prompts(20)
    assert len(set(held)) == len(set(calib)) == 180
    assert not {parse_prompt(p) for p in held} & {parse_prompt(p) for p in calib}
    assert {parse_prompt(p) for p in held} <= set(held_out_scenes())
    assert not set(held_out_scenes()) & set(train_scenes())
    assert len(held_out_prompts(700)) == 700


def test_detectors_on_ground_truth(rendered: list[tuple[Scene, np.ndarray]]) -> None:
    scores = [adherence(frames, scene) for scene, frames in rendered]
    for key in ("colour", "shape", "direction"):
        assert np.mean([s[f"{key}_hit"] for s in scores]) >= 0.99
        assert np.mean([s[key] for s in scores]) >= 0.97
    found = [detect(frames) for _, frames in rendered]
    assert np.mean([d.size == s.size for d, (s, _) in zip(found, rendered, strict=True)]) >= 0.99
    assert np.mean([d.background == s.background for d, (s, _) in zip(found, rendered, strict=True)]) >= 0.99


def test_detectors_at_chance_on_shuffled_prompts(rendered: list[tuple[Scene, np.ndarray]]) -> None:
    order = np.random.default_rng(1).permutation(UNITS)
    scores = [adherence(rendered[i][1], rendered[j][0]) for i, j in enumerate(order)]
    for key in ("colour", "shape", "direction"):
        values = [getattr(scene, key) for scene, _ in rendered]
        chance = sum((values.count(v) / UNITS) ** 2 for v in set(values))
        assert chance < {"colour": 0.14, "shape": 0.39, "direction": 0.27}[key]
        spread = (chance * (1 - chance) / UNITS) ** 0.5
        for name in (key, f"{key}_hit"):
            assert abs(np.mean([s[name] for s in scores]) - chance) < 4 * spread, name


@pytest.mark.parametrize(("height", "width", "frames"), [(128, 128, 5), (64, 96, 17)])
def test_detectors_at_other_sizes(height: int, width: int, frames: int) -> None:
    for i in range(20):
        scene = sample_scene(100 + i)
        score = adherence(render(scene, i, frames, height, width), scene)
        assert score["colour_hit"] == score["shape_hit"] == score["direction_hit"] == 1.0, scene


def test_soft_scores_fall_with_damage() -> None:
    """Noise and blur lower the soft scores before the hits change."""
    rng = np.random.default_rng(0)
    drops = []
    for i in range(20):
        scene = sample_scene(i)
        frames = render(scene, i).astype(np.float64)
        means = []
        for level in (0.0, 15.0, 45.0):
            noisy = np.clip(frames + rng.normal(0, level, frames.shape), 0, 255).astype(np.uint8)
            means.append(adherence(noisy, scene)["shape"])
        drops.append(means)
    clean, slight, strong = np.mean(drops, 0)
    assert clean > slight > strong


def test_empty_and_still_clips() -> None:
    scene = Scene("circle", "red", "left", "grey", "small")
    empty = np.full((9, 64, 64, 3), 115, np.uint8)
    assert set(adherence(empty, scene).values()) == {0.0}
    assert detect(empty).colour is None and detect(empty).background == "grey"
    still = np.repeat(render(scene, 0)[:1], 9, 0)
    score = adherence(still, scene)
    assert score["direction"] < 0.01 and score["direction_hit"] == 0.0 and score["colour_hit"] == 1.0
    with pytest.raises(ValueError, match="uint8"):
        detect(empty.astype(np.float32))
