"""Seeds, names, shards, settings: values that must never change, computed here independently."""

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from generation_helpers import SETTINGS
from hypothesis import given
from hypothesis import strategies as st

from ptq.errors import UsageError
from ptq.generation import identify_model
from ptq.generation.units import make_units, safe_name
from ptq.prompts import Sample, unit_seed
from ptq.store.sharding import Shard, detect_shard, local_rank, parse_shard


def reference_seed(base: int, dataset: str, sample_id: str, k: int) -> int:
    hasher = hashlib.new("blake2b")
    for part in (dataset, "|", sample_id, "|", str(k)):
        hasher.update(part.encode("utf-8"))
    return base + struct.unpack(">I", hasher.digest()[:4])[0]


def test_seeds_are_pinned():
    # First 8 hex digits of `printf 'vbench|a cat|0' | b2sum`: a change would unpair every run ever made.
    assert unit_seed(0, "vbench", "a cat", 0) == 0xE66FB895
    assert unit_seed(1000, "prompt", "été", 4) == 1000 + 0xC51C32FE


@given(st.integers(0, 2**40), st.text(min_size=1), st.text(min_size=1), st.integers(0, 99))
def test_seed_equals_an_independent_computation(base, dataset, sample_id, k):
    assert unit_seed(base, dataset, sample_id, k) == reference_seed(base, dataset, sample_id, k)


@given(st.lists(st.text(min_size=1, max_size=300), min_size=2, max_size=8, unique=True))
def test_names_are_safe_and_distinct(ids):
    names = [safe_name(i) for i in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        assert len(name.encode()) <= 80 and not name.startswith((".", "-"))
        assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~")


def test_a_plain_id_is_its_own_name_and_no_other_id_can_take_it():
    assert safe_name("clip_0001-a.b") == "clip_0001-a.b"
    captions = ["a cat " * 200 + end for end in ("1", "2")]
    assert safe_name(captions[0]) != safe_name(captions[1])
    assert safe_name("a/b") != safe_name("a_b") and safe_name("..") != ".."
    shortened = safe_name("a/b")
    assert safe_name(shortened) != shortened


def test_seeds_of_scheme_vbench_are_pinned():
    samples = [Sample("vb", name, name, name) for name in ("z", "a", "m")]
    seeds = {unit.name: unit.seed(0, "vbench") for unit in make_units(samples, 5)}
    assert [seeds[f"vb/z/{j}"] for j in range(5)] == [0, 1, 2, 3, 4]
    assert [seeds[f"vb/a/{j}"] for j in (0, 4)] == [100000, 100004] and seeds["vb/m/2"] == 200002
    assert {unit.seed(42, "same") for unit in make_units(samples)} == {42}
    assert [unit.seed(3) for unit in make_units(samples)] == [reference_seed(3, "vb", name, 0) for name in "zam"]


def test_samples_that_a_scheme_cannot_tell_apart_are_refused():
    for change, limit, words in (
        ({"seed_scheme": "vbench", "seed": 0}, 5, "has seeds for 5 samples of a prompt, found --samples-per-prompt 6"),
        ({"seed_scheme": "same"}, 1, "With --seed-scheme same every video starts from the same noise, so all 2"),
        ({"fixed_latent": "a" * 64}, 1, "With --fixed-latent every video starts from the same noise"),
    ):
        settings = replace(SETTINGS, **change)
        settings.check_samples(limit)
        with pytest.raises(UsageError, match=words):
            settings.check_samples(limit + 1)
    SETTINGS.check_samples(10_000)


def test_units_are_in_order_and_refuse_what_would_collide():
    a, b = Sample("d", "a", "p", "p"), Sample("d", "b", "p", "p")
    assert [u.name for u in make_units([a, b], 2)] == ["d/a/0", "d/a/1", "d/b/0", "d/b/1"]
    with pytest.raises(UsageError, match="twice"):
        make_units([a, a])
    with pytest.raises(UsageError, match="one dataset"):
        make_units([a, Sample("e", "b", "p", "p")])
    with pytest.raises(UsageError, match="nothing to generate"):
        make_units([])


@given(st.integers(0, 60), st.integers(1, 9))
def test_shards_partition_the_units(total, count):
    parts = [Shard(i, count).select(range(total)) for i in range(count)]
    assert sorted(x for part in parts for x in part) == list(range(total))
    assert [Shard(i, count).size(total) for i in range(count)] == [len(part) for part in parts]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "0/0", "1/2/3"])
def test_a_bad_shard_is_refused(text):
    with pytest.raises(UsageError):
        parse_shard(text)


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "7",
    "SLURM_ARRAY_TASK_COUNT": "5",
    "SLURM_ARRAY_TASK_STEP": "1",
}


@pytest.mark.parametrize(
    ("environ", "index", "count"),
    [
        ({}, 0, 1),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, 2, 4),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 0, 1),  # a batch script without srun: one process
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, 3, 4),
        (
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_MAX": "8",
                "SLURM_ARRAY_TASK_COUNT": "8",
            },
            4,
            8,
        ),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1"}, 0, 1),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "6", "RANK": "1", "WORLD_SIZE": "2"}, 7, 10),
        (
            {
                "SLURM_ARRAY_TASK_ID": "30",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_MAX": "30",
                "SLURM_ARRAY_TASK_STEP": "10",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "1",
            },
            5,
            6,
        ),
    ],
)
def test_shard_from_the_launcher(environ, index, count):
    assert detect_shard(environ) == Shard(index, count)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_ARRAY_TASK_COUNT": "2"},  # --array=3,7, resubmitted
        {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": "7"},
        {"SLURM_ARRAY_TASK_COUNT": "4"},  # --array=3-5,7
        {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": "4"},
        {"SLURM_ARRAY_TASK_ID": "9"},
    ],
)
def test_an_array_with_gaps_is_no_partition(change):
    with pytest.raises(UsageError, match=r"has gaps.*--shard i/N"):
        detect_shard({**ARRAY, **change})


@pytest.mark.parametrize(
    "array",
    [
        {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"},  # --array=3: not the whole
        ARRAY,  # --array=3-7 of ten
        {**ARRAY, "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "4"},
    ],
)
def test_an_array_of_another_size_than_the_run_names_both(tmp_path, array):
    (tmp_path / "state").mkdir()
    lock = tmp_path / "state" / "shard-3of10.lock"
    lock.touch()
    with pytest.raises(UsageError, match=r"begun in 10 parts.*--shard i/10"):
        detect_shard(array, tmp_path)
    assert detect_shard({"RANK": "1", "WORLD_SIZE": "2"}, tmp_path) == Shard(1, 2)
    lock.rename(tmp_path / "manifest-0of10.jsonl")  # the locks may be deleted
    with pytest.raises(UsageError, match="begun in 10 parts"):
        detect_shard(array, tmp_path)
    assert detect_shard({**ARRAY, "SLURM_ARRAY_TASK_MAX": "12", "SLURM_ARRAY_TASK_COUNT": "10"}, tmp_path).count == 10
    (tmp_path / "manifest-0of10.jsonl").rename(tmp_path / "manifest-0of1.jsonl")  # begun whole, now split
    assert detect_shard(ARRAY, tmp_path) == Shard(0, 5)


def test_a_launcher_without_a_usable_rank_is_refused():
    with pytest.raises(UsageError, match="RANK"):
        detect_shard({"WORLD_SIZE": "2"})
    assert local_rank({"LOCAL_RANK": "3"}) == 3 and local_rank({"SLURM_LOCALID": "1"}) == 1 and local_rank({}) == 0


@pytest.mark.parametrize(
    "change",
    [
        *({"height": 33}, {"steps": 0}, {"seed": -1}, {"flow_shift": 0.0}, {"fixed_latent": "latent.safetensors"}),
        *({"seed_scheme": "VBench"}, {"seed_scheme": None}, {"seed_scheme": "vbench", "seed": 7}),
    ],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(UsageError):
        type(SETTINGS)(**{**SETTINGS.as_json(), **change})


def test_identity_follows_content_not_place(pipe_dir: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(pipe_dir, copy)
    (copy / "ptq_manifest.json").write_text("{}")
    (copy / "README.md").write_text("notes")
    first, second = identify_model("a", pipe_dir), identify_model("b", copy)
    assert first.digest == second.digest and first.format is None and first.weight_bytes > 100_000
    weights = next((copy / "transformer_2").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identify_model("b", copy).digest != first.digest


def test_identity_sees_linked_components(pipe_dir: Path, tmp_path: Path):
    import shutil

    linked = tmp_path / "linked"
    shutil.copytree(pipe_dir, linked)
    shutil.move(linked / "vae", tmp_path / "vae")
    (linked / "vae").symlink_to(tmp_path / "vae")
    assert identify_model("a", linked) == identify_model("a", pipe_dir)


def test_identity_of_large_files_sees_header_and_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ptq.wan.identity._WHOLE_FILE_BYTES", 1 << 16)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer" / "config.json").write_text('{"quantization_config": {"format": "hif4"}}')
    weights = tmp_path / "transformer" / "w.safetensors"
    header = b'{"x":1}'
    content = len(header).to_bytes(8, "little") + header + bytes(1 << 20)
    digests = set()
    for data in (content, content + b"\0", content.replace(b'"x"', b'"y"'), content[:-5] + b"other"):
        weights.write_bytes(data)
        identity = identify_model("m", tmp_path)
        digests.add(identity.digest)
        assert identity.format == "hif4"
    assert len(digests) == 4
