"""One list of mutations against the files of a model, and against what killed processes leave: refused, or made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from malformed import NAMES, Artifact, cases, command, mutate
from safetensors.torch import save

from ptq.checkpoint.shards import INDEX_NAME, SHARD_NAME, ShardSet, write_component
from ptq.generation.claims import Claims, units_in_work
from ptq.store.locks import owner
from ptq.store.records import read_prompt_records
from ptq.store.sharding import Shard
from ptq.tiny import assets_dir

TINY = assets_dir("tiny")
WEIGHTS = sorted(ShardSet(TINY / "transformer").entries)


def generated(folder: Path) -> tuple[object, ...]:
    model, out = folder, folder / "out"
    return "generate", model, "--prompt", "a red ball", "--device", "cpu", "--out", out, "--no-preflight", "--dry-run"


def of_model(file: str, *number: str, passes: tuple[str, ...] = ("extra",), every: bool = False) -> Artifact:
    """A file of the embedded model, and the path to a value in it; further keys are let be in files of other libraries."""
    content = json.loads((TINY / file).read_text())
    return Artifact(file, content, number, generated, passes=frozenset(passes), every=every)


ANY_LENGTH = ("extra", "missing", "value null", "value negative")
ARTIFACTS = {
    "model-index": of_model("model_index.json", "boundary_ratio", every=True),
    "expert": of_model("transformer/config.json", "num_layers"),
    "second-expert": of_model("transformer_2/config.json", "ffn_dim"),
    "vae": of_model("vae/config.json", "z_dim"),
    "text-encoder": of_model("text_encoder/config.json", "d_model"),
    "scheduler": of_model("scheduler/scheduler_config.json", "flow_shift"),
    "tokenizer-config": of_model("tokenizer/tokenizer_config.json", "model_max_length", passes=ANY_LENGTH),
    "tokenizer": of_model("tokenizer/tokenizer.json", "model", "vocab", "</s>", passes=("extra", "missing")),
    "preset": of_model("ptq_preset.json", "steps", passes=()),
    "shards": Artifact(
        f"transformer/{INDEX_NAME}",
        {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(WEIGHTS, SHARD_NAME.format(index=1, count=1))},
        ("weight_map", WEIGHTS[0]),
        generated,
        named="transformer",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `tiny` whose first expert has an index."""
    model = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("model") / "tiny"))
    entries = ShardSet(TINY / "transformer").entries
    next((model / "transformer").glob("*.safetensors")).unlink()
    write_component(model / "transformer", list(entries.values()))
    assert command(*generated(model)).code == 0
    return model


@pytest.fixture
def model(whole: Path) -> Iterator[Path]:
    """The same directory for every case; what a case wrote into it is put back."""
    files = {artifact.file: (whole / artifact.file).read_bytes() for artifact in ARTIFACTS.values()}
    yield whole
    for name, data in files.items():
        (whole / name).write_bytes(data)


@pytest.mark.parametrize(("name", "mutation"), cases(ARTIFACTS))
def test_a_malformed_file_of_a_model_is_refused(model: Path, name: str, mutation: str) -> None:
    ARTIFACTS[name].refused(model, mutation)


CLAIM = {"shard": "1of2", "host": "h", "pid": 3, "started": "now"}


@pytest.mark.parametrize("mutation", NAMES)
def test_a_malformed_claim_is_no_obstacle(tmp_path: Path, mutation: str) -> None:
    """One that names another living shard counts; every other is a dead process's, and is replaced."""
    path = tmp_path / "a-0.claim"
    path.write_bytes(mutate(CLAIM, ("shard",), mutation))
    readable = mutation == "extra"  # a claim of a megabyte is none
    claims = Claims(tmp_path, Shard(0, 2), stale_seconds=600)
    took: list[bool] = []

    def look() -> None:
        units_in_work(tmp_path)
        assert len(claims.holder("a-0")) < 250
        took.append(claims.acquire("a-0"))

    outcome = command(look)
    assert took == [not readable] and not outcome.text and outcome.megabytes < 100
    if not readable:
        assert json.loads(path.read_text())["shard"] == "0of2" and owner()["pid"] == json.loads(path.read_text())["pid"]
    claims.release()


HEADER = [
    {
        "record": "00000-001-cond", "file": "records/00000.safetensors", "sample_id": "a", "expert": "transformer", "step": 1,
        "timestep": 999.0, "sigma": 0.5, "d_sigma": 0.25, "branch": "cond",
    }
]  # fmt: skip


def record_file(path: Path, header: str) -> None:
    tensors = {"00000-001-cond.hidden_states": torch.zeros(1), "00000-001-cond.timestep": torch.zeros(1)}
    path.write_bytes(save(tensors, {"records": header}))


@pytest.mark.parametrize("mutation", [name for name in NAMES if name not in ("garbage", "utf-16", "latin-1")])
def test_a_malformed_header_of_a_record_file_is_recorded_again(tmp_path: Path, mutation: str) -> None:
    """Headers are text: bytes that are not UTF-8 never get so far."""
    path = tmp_path / "00000.safetensors"
    record_file(path, json.dumps(HEADER))
    assert read_prompt_records(path)
    record_file(path, mutate(HEADER, (0, "step"), mutation).decode())
    found = []
    outcome = command(lambda: found.append(read_prompt_records(path)))
    assert not found[0] and not outcome.text and outcome.megabytes < 300
