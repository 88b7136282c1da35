"""Shapes that users have beside the data sets': wrapped lists, lists of strings, CSV; halves of characters; missing clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptq.errors import DamagedFileError, PtqError
from ptq.prompts import MediaRef, load_image, read_prompts


def texts(path: Path, content: object) -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return [sample.prompt for sample in read_prompts(path).samples]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", {"prompts": ["a red ball", "two people"]}),
        ("a.json", {"title": "mine", "prompts": [{"prompt": "a red ball"}, {"text": "two people"}]}),
        ("a.json", ["a red ball", "two people"]),
        ("a.jsonl", b'"a red ball"\n{"prompt": "two people"}\n'),
        ("a.csv", b"prompt,seed\na red ball,1\n\ntwo people,2\n"),
        ("a.csv", b'\xef\xbb\xbfID, Prompt\n1,"a red ball"\r\n2,"two people"\r\n'),
    ],
)
def test_shapes_that_are_read(tmp_path: Path, name: str, content: object) -> None:
    assert texts(tmp_path / name, content) == ["a red ball", "two people"]


def test_a_comma_in_quotes_and_ids_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,prompt\nx,"a red ball, rolling"\n,plain\n')
    first, second = read_prompts(tmp_path / "a.csv").samples
    assert (first.id, first.prompt) == ("x", "a red ball, rolling") and len(second.id) == 12


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("half", ["\\ud800", "\\udc00", "\\uDBFFx", "\\ud800\\\\udc00"])
def test_half_of_a_surrogate_pair_is_refused_with_its_record(tmp_path: Path, name: str, half: str) -> None:
    good, bad = '{"prompt": "\\ud83d\\ude00 \\\\ud800"}', f'{{"prompt": "a{half}b"}}'
    (tmp_path / name).write_text(f"[{good},{bad}]" if name == "a.json" else f"{good}\n{bad}\n")
    with pytest.raises(DamagedFileError, match=r"(record \[1\]|line 2).*surrogate"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("pieces", [1, 3, 65_530])
def test_pairs_survive_where_the_file_is_read_in_pieces(tmp_path: Path, pieces: int) -> None:
    prompts = [f"{'x' * (pieces + shift)}\U0001f600\\ud800 {shift}" for shift in range(30)]
    assert texts(tmp_path / "a.json", prompts) == prompts


def test_the_number_of_prompts_counts_those_that_can_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"prompt": f"p{index}", "image": f"{index}.png"} for index in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for index in (3, 17, 19):
        (tmp_path / f"{index}.png").touch()
    found = read_prompts(tmp_path / "a.json", limit=2, skip_missing=True)
    assert [sample.id for sample in found.samples] == ["3", "17"]
    assert "16 prompts were passed over" in capsys.readouterr().err
    (tmp_path / "b.json").write_text(json.dumps(records[:3]))
    with pytest.raises(PtqError, match="None of the 3 images"):
        read_prompts(tmp_path / "b.json", skip_missing=True)


def picture(path: Path) -> np.ndarray:
    return load_image(MediaRef("image", path.name, resolved=path))


def test_16_bit_greys_are_scaled_and_32_bit_ones_refused(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a.png", "a.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        assert np.array_equal(picture(tmp_path / name)[..., 0], np.round(levels / 257).astype(np.uint8))
    for kind in (np.int32, np.float32):
        Image.fromarray(levels.astype(kind)).save(tmp_path / "b.tif")
        with pytest.raises(DamagedFileError, match=r"b\.tif has 32-bit"):
            picture(tmp_path / "b.tif")


@pytest.mark.parametrize("name", ["evil.eps", "evil.png"])
def test_postscript_is_refused_and_not_run(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(DamagedFileError, match="should be one of PNG, JPEG"):
        picture(tmp_path / name)


def test_transparent_animated_and_huge_pictures(tmp_path: Path) -> None:
    pixels = np.full((4, 6, 4), 255, np.uint8)
    pixels[..., 0] = 200
    pixels[0, 0] = (9, 9, 9, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert picture(tmp_path / "a.png")[0, 0].tolist() == [255, 255, 255]
    assert picture(tmp_path / "a.png")[1, 1].tolist() == [200, 255, 255]
    solid = Image.fromarray(pixels[1:, :, :3])
    solid.convert("CMYK").save(tmp_path / "c.tif")
    assert np.abs(picture(tmp_path / "c.tif").astype(int) - pixels[1:, :, :3]).max() <= 1
    solid.save(tmp_path / "b.png", save_all=True, append_images=[Image.new("RGB", solid.size)])
    with pytest.raises(DamagedFileError, match="animation"):
        picture(tmp_path / "b.png")
    Image.new("1", (10_000, 8_000)).save(tmp_path / "d.png")
    with pytest.raises(DamagedFileError, match="10000 x 8000 pixels"):
        picture(tmp_path / "d.png")


def test_a_playlist_is_no_clip(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/hostname\n")
    with pytest.raises(DamagedFileError, match=r"a\.mp4 cannot be decoded"):
        load_image(MediaRef("video", "a.mp4", resolved=tmp_path / "a.mp4"))
