"""Several processes, one directory: the same files as one process, and clear refusals instead of collisions."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from generation_helpers import MODEL, SETTINGS, file_digests, lines, make_samples, run, start_run

from ptq.errors import PtqError
from ptq.generation import read_status, run_generation
from ptq.generation.claims import Claims
from ptq.store.locks import live_shards, shard_lock
from ptq.store.sharding import Shard


def test_three_processes_at_once_equal_one(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    out = tmp_path / "run"
    children = [start_run(pipe_dir, out, make_samples(4), Shard(i, 3)) for i in range(3)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert file_digests(out) == file_digests(whole_run)
    found = {
        p.name: [line["unit"] for line in map(json.loads, p.read_text().splitlines())]
        for p in out.glob("manifest-*.jsonl")
    }
    assert found == {
        "manifest-0of3.jsonl": ["world/s0/0", "world/s3/0"],
        "manifest-1of3.jsonl": ["world/s1/0"],
        "manifest-2of3.jsonl": ["world/s2/0"],
    }
    keys = ("unit", "seed", "latent_sha256", "video_sha256", "final_latents_sha256")
    assert sorted([line[k] for k in keys] for line in lines(out)) == [
        [line[k] for k in keys] for line in lines(whole_run)
    ]
    state = read_status(out)
    assert [(s.tag, s.share, s.done) for s in state.shards] == [("0of3", 2, 2), ("1of3", 1, 1), ("2of3", 1, 1)]
    assert (state.remaining, state.seconds_left) == (0, 0.0) and not any(s.running for s in state.shards)


def test_three_shards_one_killed_twice_equal_an_unsharded_run(pipe_dir: Path, tmp_path: Path):
    whole, out, samples = tmp_path / "whole", tmp_path / "run", make_samples(24)
    assert run(pipe_dir, whole, samples).done == 24
    children = [start_run(pipe_dir, out, samples, Shard(i, 3)) for i in (0, 2)]
    manifest = out / "manifest-1of3.jsonl"
    for kill in (1, 2):
        victim = start_run(pipe_dir, out, samples, Shard(1, 3))
        wait_for(lambda wanted=2 * kill: manifest.exists() and len(manifest.read_bytes().splitlines()) >= wanted)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    assert len(manifest.read_bytes().splitlines()) < 8
    children.append(start_run(pipe_dir, out, samples, Shard(1, 3)))
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert file_digests(out) == file_digests(whole) and len(lines(out)) == 24


def test_another_number_of_shards_keeps_what_is_there(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert run(pipe_dir, out, make_samples(4), shard=Shard(0, 2)).done == 2
    summary = run(pipe_dir, out, make_samples(4))
    assert (summary.kept, summary.done, summary.remaining) == (2, 2, 0)
    assert file_digests(out) == file_digests(whole_run)


def test_the_same_shard_twice_is_refused_while_the_first_runs(tmp_path: Path):
    (tmp_path / "state").mkdir()
    with shard_lock(tmp_path / "state", Shard(0, 2)):
        for shard, text in ((Shard(0, 2), f"process {os.getpid()}"), (Shard(0, 3), "another number of shards")):
            with pytest.raises(PtqError, match=text):
                run_generation(None, make_samples(4), SETTINGS, tmp_path, model=MODEL, shard=shard)
        assert live_shards(tmp_path / "state") == ["0of2"] and not (tmp_path / "run.json").exists()
    assert live_shards(tmp_path / "state") == []


def test_fresh_in_one_shard_does_not_delete_what_others_made(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    out = tmp_path / "run"
    for i in range(2):
        run(pipe_dir, out, make_samples(4), shard=Shard(i, 2))
    summary = run(pipe_dir, out, make_samples(4), shard=Shard(0, 2), fresh=True)
    assert (summary.kept, summary.done) == (0, 2)
    assert file_digests(out) == file_digests(whole_run) and len(lines(out)) == 4


def test_fresh_with_other_settings_is_refused_while_another_shard_runs(pipe_dir: Path, tmp_path: Path):
    out = tmp_path / "run"
    run(pipe_dir, out, make_samples(2), shard=Shard(0, 2))
    changed = type(SETTINGS)(**{**SETTINGS.as_json(), "steps": 2})
    with shard_lock(out / "state", Shard(1, 2)):
        before = file_digests(out)
        with pytest.raises(PtqError, match="1of2"):
            run(pipe_dir, out, make_samples(2), changed, shard=Shard(0, 2), fresh=True)
        assert file_digests(out) == before


def test_an_idle_shard_takes_over_what_others_left(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    out = tmp_path / "run"
    summary = run(pipe_dir, out, make_samples(4), shard=Shard(1, 3), take_over=True)
    assert (summary.done, summary.taken_over) == (4, 3)
    assert file_digests(out) == file_digests(whole_run)
    late = run_generation(None, make_samples(4), SETTINGS, out, model=MODEL, shard=Shard(0, 3))
    assert (late.kept, late.done, late.remaining) == (2, 0, 0)


def test_take_over_waits_for_a_living_claim_and_replaces_a_dead_one(pipe_dir: Path, tmp_path: Path):
    out = tmp_path / "run"
    run(pipe_dir, out, make_samples(1))
    (out / "state" / "s1-0.claim").write_text('{"shard": "1of2"}')  # shard 1 claims its unit, then gives no more sign
    started = time.monotonic()
    summary = run(pipe_dir, out, make_samples(2), shard=Shard(0, 2), take_over=True, stale_minutes=0.04)
    assert (summary.kept, summary.taken_over) == (1, 1)
    assert time.monotonic() - started > 2.0
    assert not list((out / "state").glob("*.claim"))


@pytest.mark.parametrize("content", [b"", b'{"shard": ', b"[]", b"\xff", b"[" * 100_000, b'{"shard": null}', b"{}"])
def test_a_claim_that_names_nobody_is_dead_at_once(content: bytes, tmp_path: Path):
    (tmp_path / "s0-0.claim").write_bytes(content)
    with Claims(tmp_path, Shard(0, 2), 600) as claims:
        assert not claims.is_held_elsewhere("s0-0") and claims.acquire("s0-0")
        claims.release()
    assert not list(tmp_path.glob("*.claim"))


def test_claims_appear_whole_and_the_one_that_is_waited_for_is_named(pipe_dir: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    run(pipe_dir, out, make_samples(1))
    with Claims(out / "state", Shard(1, 2), 60) as other:
        assert other.acquire("s1-0")
        claim = json.loads((out / "state" / "s1-0.claim").read_text())
        assert claim["shard"] == "1of2" and claim["pid"] == os.getpid() and claim["host"]
        threading.Timer(3.0, other.release).start()
        run(pipe_dir, out, make_samples(2), shard=Shard(0, 2), take_over=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"Waiting for 1 units in the hands of process {os.getpid()} on {claim['host']} (since" in said
    assert said.count("Waiting for") == 1


def test_own_unit_in_the_hands_of_another_process_is_left_to_it(pipe_dir: Path, tmp_path: Path):
    """Shard 1 came late: shard 0 has taken its unit over. It waits, and counts the unit as made elsewhere."""
    out = tmp_path / "run"
    (out / "state").mkdir(parents=True)
    with Claims(out / "state", Shard(0, 2), 60) as others:
        assert others.acquire("s1-0")
        child = start_run(pipe_dir, out, make_samples(2), Shard(1, 2))
        wait_for(lambda: live_shards(out / "state") == ["1of2"])
        time.sleep(0.5)
        assert lines(out) == [] and child.is_alive()
        made = run(pipe_dir, tmp_path / "other", make_samples(2), shard=Shard(1, 2))
        assert made.done == 1
        for path in (tmp_path / "other").glob("*/s1-0.*"):
            (out / path.parent.name).mkdir(exist_ok=True)
            path.rename(out / path.parent.name / path.name)
        (tmp_path / "other" / "manifest-1of2.jsonl").rename(out / "manifest-0of2.jsonl")
        others.release()
    child.join()
    assert child.exitcode == 0 and not (out / "manifest-1of2.jsonl").exists()


def test_claims_exclude_each_other_and_stay_alive_by_their_heartbeat(tmp_path: Path):
    with Claims(tmp_path, Shard(0, 2), 1.0) as first, Claims(tmp_path, Shard(1, 2), 1.0) as second:
        assert first.acquire("a") and not second.acquire("a") and second.acquire("b")
        time.sleep(1.3)
        assert second.is_held_elsewhere("a")  # older than the limit, but touched meanwhile
        first.release()
        assert not second.is_held_elsewhere("a")
    assert not list(tmp_path.glob("*.claim"))


def test_status_sees_a_running_shard(pipe_dir: Path, tmp_path: Path):
    out = tmp_path / "run"
    child = start_run(pipe_dir, out, make_samples(30))
    wait_for(lambda: (out / "manifest-0of1.jsonl").exists() and lines(out))
    state = read_status(out)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    (shard,) = state.shards
    assert shard.running and shard.share == 30 and shard.done >= 1 and state.remaining < 30
    assert state.seconds_left == pytest.approx(state.remaining * shard.seconds_per_unit)
    assert not read_status(out).shards[0].running


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
