"""Finding pictures and clips, reading their pixels, and the resize policy."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.prompts import MediaRef, fit_image, load_image, read_prompts, require_media

CLIP = "/home/x/OpenS2V-5M/total_part2/part_1/a/a.mp4"
FRAMES, HEIGHT, WIDTH = 6, 48, 64


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def resolve(folder: Path, records: object, *roots: Path, name: str = "prompts.json") -> list[Path | None]:
    path = folder / name
    path.write_text(json.dumps(records))
    return [sample.media.resolved for sample in read_prompts(path, media_root=roots).samples]


def make_clip(path: Path) -> Path:
    """Frame i: brightness 30 * i on the left half, 255 on the right half; the top 16 rows are black."""
    with av.open(str(path), "w") as clip:
        stream = clip.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(FRAMES):
            pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
            pixels[:, : WIDTH // 2] = 30 * index
            pixels[:16] = 0
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        clip.mux(stream.encode())
    return path


def test_foreign_absolute_paths_are_rerooted(tmp_path: Path) -> None:
    (home := tmp_path / "home").mkdir()
    record = [{"path": CLIP, "cap": "x"}]
    below_dataset = touch(tmp_path / "r1/total_part2/part_1/a/a.mp4")
    assert resolve(home, record) == [None]
    assert resolve(home, record, tmp_path / "r1") == [below_dataset]
    # The part after OpenS2V-5M/ and the part from total_partN differ when there is a folder between them.
    nested = [{"path": "/x/OpenS2V-5M/Videos/total_part2/part_1/a/a.mp4", "cap": "x"}]
    assert resolve(home, nested, tmp_path / "r1") == [below_dataset]
    exact = touch(tmp_path / "r2/Videos/total_part2/part_1/a/a.mp4")
    assert resolve(home, nested, tmp_path / "r2") == [exact]
    # Roots are tried in order, and the path as written goes before all of them.
    assert resolve(home, nested, tmp_path / "r2", tmp_path / "r1") == [exact]
    assert resolve(home, nested, tmp_path / "r1", tmp_path / "r2") == [below_dataset]
    own = touch(tmp_path / "own/OpenS2V-5M/total_part2/part_1/a/a.mp4")
    assert resolve(home, [{"path": str(own), "cap": "x"}], tmp_path / "r1") == [own]
    # The prompt file's own folder counts as the first root: the file may lie in the data set.
    beside = touch(home / "total_part2/part_1/a/a.mp4")
    assert resolve(home, record, tmp_path / "r1") == [beside]
    # Only whole folder names count.
    assert resolve(home, [{"path": "/x/notOpenS2V-5M/a.mp4", "cap": "x"}], tmp_path / "r1") == [None]


def test_relative_paths_are_looked_up_beside_the_file_and_below_roots(tmp_path: Path) -> None:
    (home := tmp_path / "home").mkdir()
    record = [{"prompt": "x", "image": "Images/a.png"}]
    below = touch(tmp_path / "root/Images/a.png")
    assert resolve(home, record, tmp_path / "root") == [below]
    beside = touch(home / "Images/a.png")
    assert resolve(home, record, tmp_path / "root") == [beside]
    native = {"k": {"metadata": {"path": "part_1/v.mp4", "face_cut": [0, 1], "crop": [0, 8, 0, 8], "cap": ["x"]}}}
    in_part = touch(tmp_path / "root/total_part3/part_1/v.mp4")
    assert resolve(home, native, tmp_path / "root", name="total_part3.json") == [in_part]
    assert resolve(home, native, tmp_path / "root", name="total_part4.json") == [None]
    vbench = [{"prompt_en": "x", "dimension": ["d"], "image_name": "a b.jpg"}]
    wide = touch(tmp_path / "data/crop/16-9/a b.jpg")
    square = touch(tmp_path / "data/crop/1-1/a b.jpg")
    assert resolve(home, vbench, tmp_path / "data") == [wide]
    assert resolve(home, vbench, tmp_path / "data/crop/1-1") == [square]


def test_media_root_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is not a directory"):
        resolve(tmp_path, [{"path": CLIP, "cap": "x"}], tmp_path / "nowhere")


def test_missing_media_are_listed_and_change_no_identity(tmp_path: Path) -> None:
    records = [{"prompt": f"p{index}", "image": f"{index}.png"} for index in range(20)]
    for index in (3, 17):
        touch(tmp_path / f"{index}.png")
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    prompts = read_prompts(path)
    assert [one.id for one in prompts.samples] == [str(index) for index in range(20)]
    with pytest.raises(PtqError, match=r"18 of 20 samples.*0 \(0\.png\), 1 \(1\.png\).*and 8 more.*--skip-missing"):
        require_media(prompts)
    assert [one.id for one in require_media(prompts, skip_missing=True)] == ["3", "17"]
    for index in (3, 17):
        (tmp_path / f"{index}.png").unlink()
    with pytest.raises(PtqError, match="nothing to run"):
        require_media(read_prompts(path), skip_missing=True)
    text_only = tmp_path / "a.txt"
    text_only.write_text("a prompt\n")
    with pytest.raises(PtqError, match="names no image for 1 of 1"):
        require_media(read_prompts(text_only), skip_missing=True)


@pytest.mark.parametrize("index", range(FRAMES))
def test_the_right_frame_of_a_clip(tmp_path: Path, index: int) -> None:
    clip = make_clip(tmp_path / "a.mp4")
    frame = load_image(MediaRef("video", "a.mp4", frame=index, resolved=clip))
    assert (frame.dtype, frame.shape) == (np.uint8, (HEIGHT, WIDTH, 3))
    assert abs(frame[20:, : WIDTH // 2 - 4].mean() - 30 * index) < 4
    assert frame[20:, WIDTH // 2 + 4 :].mean() > 250


def test_crop_is_x0_x1_y0_y1(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4")
    whole = load_image(MediaRef("video", "a.mp4", frame=2, resolved=clip))
    part = load_image(MediaRef("crop", "a.mp4", frame=2, crop=(8, 60, 4, 20), resolved=clip))
    assert part.shape == (16, 52, 3)
    assert np.array_equal(part, whole[4:20, 8:60])
    with pytest.raises(DamagedFileError, match=r"64 x 48 pixels.*x 0-65, y 0-48"):
        load_image(MediaRef("crop", "a.mp4", crop=(0, 65, 0, 48), resolved=clip))


def test_broken_clips_are_named(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4")
    with pytest.raises(DamagedFileError, match=r"a\.mp4 has 6 frames.*frame 6"):
        load_image(MediaRef("video", "a.mp4", frame=6, resolved=clip))
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:200])
    with pytest.raises(DamagedFileError, match=r"cut\.mp4 cannot be decoded"):
        load_image(MediaRef("video", "cut.mp4", resolved=tmp_path / "cut.mp4"))
    with pytest.raises(PtqError, match=r"a\.mp4 was not found"):
        load_image(MediaRef("video", "a.mp4"))
    with av.open(str(tmp_path / "sound.mkv"), "w") as sound:
        stream = sound.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        sound.mux(stream.encode(samples))
        sound.mux(stream.encode())
    with pytest.raises(DamagedFileError, match="no video stream"):
        load_image(MediaRef("video", "sound.mkv", resolved=tmp_path / "sound.mkv"))


def test_pictures_are_rgb_and_upright(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    assert np.array_equal(load_image(MediaRef("image", "a.png", resolved=tmp_path / "a.png")), pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(MediaRef("image", "turned.png", resolved=tmp_path / "turned.png"))
    assert np.array_equal(turned, np.rot90(pixels, -1))
    picture.convert("L").save(tmp_path / "grey.png")
    grey = load_image(MediaRef("image", "grey.png", resolved=tmp_path / "grey.png"))
    assert grey.shape == (20, 30, 3)
    assert np.array_equal(grey[..., 0], np.array(picture.convert("L")))


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for content in (b"not a picture", whole[: len(whole) // 2], b""):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"bad\.png cannot be read"):
            load_image(MediaRef("image", "bad.png", resolved=tmp_path / "bad.png"))


def test_fit_keeps_a_picture_of_the_right_size() -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    assert np.array_equal(fit_image(image, 48, 80), image)


@pytest.mark.parametrize(("height", "width"), [(50, 50), (100, 40), (30, 120), (240, 480), (96, 96)])
def test_fit_is_cover_then_centre_crop_with_lanczos(height: int, width: int) -> None:
    """Against the two steps done one after the other: whole picture scaled to cover, then the middle cut out."""
    rng = np.random.default_rng(1)
    image = np.array(Image.fromarray(rng.integers(0, 256, (10, 20, 3), np.uint8)).resize((200, 100), 3))
    fitted = fit_image(image, height, width)
    assert (fitted.dtype, fitted.shape) == (np.uint8, (height, width, 3))
    scale = max(height / 100, width / 200)
    full = Image.fromarray(image).resize((round(200 * scale), round(100 * scale)), Image.Resampling.LANCZOS)
    top, left = (full.height - height) // 2, (full.width - width) // 2
    reference = np.array(full)[top : top + height, left : left + width].astype(int)
    difference = np.abs(fitted.astype(int) - reference)[4:-4, 4:-4]  # at the edges one step cannot see what it cut off
    assert difference.max() <= 1


def test_fit_crops_both_sides_alike_and_refuses_other_arrays() -> None:
    image = np.random.default_rng(2).integers(0, 256, (60, 200, 3), np.uint8)
    assert np.array_equal(fit_image(image[:, ::-1].copy(), 48, 80), fit_image(image, 48, 80)[:, ::-1])
    for wrong in (image.astype(np.float32), image[..., 0], np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            fit_image(wrong, 48, 80)
