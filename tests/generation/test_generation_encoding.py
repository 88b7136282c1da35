"""Prompts are encoded first, by an encoder that is gone when the denoiser comes; videos are those of the whole pipeline."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generation_helpers import MODEL, SETTINGS, file_digests, lines, make_samples
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from ptq.errors import DamagedFileError, PtqError
from ptq.generation import Settings, Summary, make_videos, prepare, run_generation
from ptq.prompts import Sample
from ptq.store.sharding import Shard
from ptq.wan import encoding
from ptq.wan.encoding import TextEncoding
from ptq.wan.layout import read_layout
from ptq.wan.loading import load_pipeline


def make(pipe_dir: Path, out: Path, samples: list[Sample], settings: Settings = SETTINGS, **options) -> Summary:
    summary = make_videos(read_layout(pipe_dir), samples, settings, out, model=MODEL, **options)
    assert summary is not None and summary.remaining == 0
    return summary


def embeddings(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "state" / "embeddings").iterdir()}


def never(*_: object) -> None:
    raise AssertionError("the text encoder was loaded")


@pytest.mark.parametrize("variant", ["T2V-A14B", "I2V-A14B", "TI2V-5B", "I2V-14B"])
def test_videos_are_those_of_the_whole_pipeline(random_pipelines, tmp_path: Path, variant: str):
    model = random_pipelines[variant]
    layout, image = read_layout(model), tmp_path / "image.png"
    Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(image)
    settings = replace(
        SETTINGS,
        guidance_scale_2=None if layout.boundary_ratio is None else 2.0,
        image_to_video=variant != "T2V-A14B",
        max_sequence_length=512 if variant == "I2V-14B" else 16,
        steps=2,
    )
    samples = make_samples(2, image if settings.image_to_video else None)
    make(model, tmp_path / "first", samples, settings)
    run_generation(lambda: load_pipeline(model), samples, settings, tmp_path / "whole", model=MODEL)
    assert file_digests(tmp_path / "first") == file_digests(tmp_path / "whole") != {}
    first, whole = ([line | dict.fromkeys(("seconds", "finished", "peak_memory_bytes")) for line in lines(out)]
                    for out in (tmp_path / "first", tmp_path / "whole"))  # fmt: skip
    assert first == whole
    assert len(embeddings(tmp_path / "first")) == 3  # two prompts and the negative one


def test_the_encoder_is_gone_before_the_denoiser_is_loaded(pipe_dir: Path, tmp_path: Path, monkeypatch):
    def alive() -> int:
        gc.collect()
        return sum(type(one) is UMT5EncoderModel for one in gc.get_objects())

    load, before, seen = prepare.load_denoiser, alive(), []

    def watch(*arguments: object):
        seen.append(alive())
        pipe = load(*arguments)
        assert pipe.text_encoder is None and pipe.tokenizer is None
        return pipe

    monkeypatch.setattr(prepare, "load_denoiser", watch)
    make(pipe_dir, tmp_path / "run", make_samples(2))
    assert seen == [before]


def test_a_continued_run_encodes_only_what_is_new(pipe_dir: Path, whole_run: Path, tmp_path: Path, monkeypatch):
    out, encoded = tmp_path / "run", []
    make(pipe_dir, out, make_samples(2))
    kept = embeddings(out)
    encode = TextEncoding._encode
    monkeypatch.setattr(TextEncoding, "_encode", lambda self, texts: (encoded.extend(texts), encode(self, texts)))
    make(pipe_dir, out, make_samples(4))
    assert encoded == ["a red ball number 2", "a red ball number 3"]
    assert file_digests(out) == file_digests(whole_run)
    assert embeddings(out).items() >= kept.items()
    monkeypatch.setattr(encoding, "load_encoder", never)
    for file in (out / "videos").iterdir():
        file.unlink()
    assert make(pipe_dir, out, make_samples(4)).done == 4
    assert file_digests(out) == file_digests(whole_run)


def test_damaged_embeddings_are_made_again(pipe_dir: Path, whole_run: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    make(pipe_dir, out, make_samples(2))
    good, folder = embeddings(out), out / "state" / "embeddings"
    names = list(good)
    (folder / names[0]).write_bytes(good[names[1]])  # another prompt's
    changed = bytearray(good[names[1]])
    changed[-1] ^= 1
    (folder / names[1]).write_bytes(changed)
    (folder / names[2]).write_bytes(good[names[2]][:40])
    for file in (out / "videos").iterdir():
        file.unlink()
    capsys.readouterr()
    make(pipe_dir, out, make_samples(2))
    assert "is damaged (3 such files); what it held is encoded again" in " ".join(capsys.readouterr().err.split())
    assert embeddings(out) == good
    assert file_digests(out).items() <= file_digests(whole_run).items()


def test_an_embedding_damaged_while_the_run_goes_on_is_not_used(pipe_dir: Path, tmp_path: Path):
    made = TextEncoding(read_layout(pipe_dir), tmp_path, "float32", 16, None)
    made.prepare(["a ball"])
    (file,) = tmp_path.iterdir()
    save_file({"prompt_embeds": load_file(file)["prompt_embeds"] * 2}, file)
    with pytest.raises(DamagedFileError, match="Run the same command again"):
        made.arguments("a ball")


def test_what_decides_an_embedding_is_in_its_name(pipe_dir: Path, random_pipelines, tmp_path: Path):
    layout = read_layout(pipe_dir)
    base = TextEncoding(layout, tmp_path, "float32", 16, "bad")
    others = [
        replace(base, length=32),
        replace(base, dtype="bfloat16"),
        replace(base, layout=read_layout(random_pipelines["TI2V-5B"])),  # another seed
        replace(base, device="cuda:1"),
    ]
    assert len({one._key("a ball") for one in (base, *others)}) == 5
    assert base._key("a ball") == replace(base, negative=None)._key("a ball") != base._key("a ball ")


def test_short_and_long_prompts_come_back_bit_for_bit(pipe_dir: Path, tmp_path: Path):
    pipe = load_pipeline(pipe_dir, dtype=torch.bfloat16)
    texts = ["", "a ball", "a red ball " * 40]
    made = TextEncoding(read_layout(pipe_dir), tmp_path, "bfloat16", 24, "")
    made.prepare(texts)
    for text in texts:
        with torch.no_grad():
            wanted = pipe.encode_prompt(text, "", max_sequence_length=24)
        found = made.arguments(text)
        for one, other in zip(found.values(), wanted, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    assert len(list(tmp_path.iterdir())) == 3  # the negative prompt is the empty one


def test_an_encoder_that_gives_nan_is_refused(pipe_dir: Path, tmp_path: Path, monkeypatch):
    load = encoding.load_encoder

    def spoilt(*arguments: object):
        pipe = load(*arguments)
        with torch.no_grad():
            pipe.text_encoder.encoder.final_layer_norm.weight[:] = float("nan")
        return pipe

    monkeypatch.setattr(encoding, "load_encoder", spoilt)
    with pytest.raises(PtqError, match="gave values that are not finite for the prompt 'a red ball number 0'"):
        make(pipe_dir, tmp_path / "run", make_samples(2))
    assert not list((tmp_path / "run").glob("state/embeddings/*"))


def test_no_guidance_encodes_no_negative_prompt_and_fresh_forgets(pipe_dir: Path, tmp_path: Path):
    out, settings = tmp_path / "run", replace(SETTINGS, guidance_scale=1.0, guidance_scale_2=1.0)
    make(pipe_dir, out, make_samples(2), settings)
    assert len(embeddings(out)) == 2
    run_generation(lambda: load_pipeline(pipe_dir), make_samples(2), settings, tmp_path / "whole", model=MODEL)
    assert file_digests(out) == file_digests(tmp_path / "whole")
    make(pipe_dir, out, make_samples(1), settings, fresh=True)
    assert len(embeddings(out)) == 1


def test_prompts_of_units_that_are_taken_over_are_encoded_too(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    out = tmp_path / "run"
    summary = make(pipe_dir, out, make_samples(4), shard=Shard(0, 2), take_over=True)
    assert (summary.done, summary.taken_over) == (4, 2)
    assert len(embeddings(out)) == 5
    assert file_digests(out) == file_digests(whole_run)
    assert json.loads((out / "run.json").read_text())["plan"]["shards"] == 2
