"""Interruptions, damage and changed requests: nothing is lost, nothing is mixed, and each outcome is a clear text."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from generation_helpers import MODEL, SETTINGS, file_digests, lines, make_samples, run, start_run

from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.generation import ModelIdentity, plan_run, read_status, run_generation
from ptq.store.sharding import Shard
from ptq.version import __version__


def never_load():
    raise AssertionError("the pipeline was loaded although there was nothing to make")


def copy_run(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_killed_and_continued_equals_uninterrupted(pipe_dir: Path, whole_run: Path, tmp_path: Path, delay: float):
    out = tmp_path / "run"
    child = start_run(pipe_dir, out, make_samples(4))
    deadline = time.monotonic() + 120
    while not (out / "manifest-0of1.jsonl").exists() or len(lines(out)) < 1:
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    before = [line["unit"] for line in lines(out)]
    assert 1 <= len(before) < 4
    summary = run(pipe_dir, out, make_samples(4))
    assert (summary.kept, summary.done, summary.remaining) == (len(before), 4 - len(before), 0)
    assert file_digests(out) == file_digests(whole_run)
    assert [line["unit"] for line in lines(out)] == [f"world/s{i}/0" for i in range(4)]


def test_what_a_kill_in_mid_write_leaves_is_cleaned_up(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    out = copy_run(whole_run, tmp_path / "run")
    manifest = out / "manifest-0of1.jsonl"
    text = manifest.read_bytes()
    manifest.write_bytes(text[: text.rindex(b'{"unit"') + 40])  # the last line is torn: its unit is not done
    (out / "videos" / ".s3-0.mp4.4242.part").write_bytes(b"half a video")
    (out / "state" / "s3-0.claim").write_text('{"shard": "0of1"}')
    assert run(pipe_dir, out, make_samples(4)).done == 1
    assert file_digests(out) == file_digests(whole_run)
    assert [line["unit"] for line in lines(out)] == [f"world/s{i}/0" for i in range(4)]


def test_the_claim_of_a_unit_that_was_finished_before_the_kill_is_swept(whole_run: Path, tmp_path: Path):
    out = copy_run(whole_run, tmp_path / "run")
    for stem, tag in {"s3-0": "0of1", "s2-0": "1of2"}.items():
        (out / "state" / f"{stem}.claim").write_text(f'{{"shard": "{tag}"}}')
    run_generation(never_load, make_samples(4), SETTINGS, out, model=MODEL)
    assert not list((out / "state").glob("*.claim"))
    (out / "state" / "s2-0.claim").write_text('{"shard": "1of2"}')  # in a living shard's hands
    (out / "state" / "s0-0.claim").write_text('{"shard": "0of2"}')
    summary = run_generation(never_load, make_samples(4), SETTINGS, out, model=MODEL, shard=Shard(0, 2))
    assert summary.kept == 2 and [path.name for path in (out / "state").glob("*.claim")] == ["s2-0.claim"]


def test_a_finished_run_loads_nothing(whole_run: Path):
    summary = run_generation(never_load, make_samples(4), SETTINGS, whole_run, model=MODEL)
    assert (summary.kept, summary.done, summary.remaining) == (4, 0, 0)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "empty", "latents"])
def test_a_damaged_file_is_made_again(pipe_dir: Path, whole_run: Path, tmp_path: Path, damage: str):
    out = copy_run(whole_run, tmp_path / "run")
    path = out / "videos" / "s2-0.mp4"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "one bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        (out / "latents" / "s2-0.safetensors").unlink()
    summary = run(pipe_dir, out, make_samples(4))
    assert (summary.kept, summary.done) == (3, 1)
    assert file_digests(out) == file_digests(whole_run)


@pytest.mark.parametrize("key", ["final_latents", "saved_frames"])
@pytest.mark.parametrize("lacking", ["digest", "file"])
def test_a_file_that_nothing_vouches_for_is_made_again(
    pipe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, lacking: str
):
    """Earlier versions kept no digest of some files; a line without the file was edited."""
    settings, out = replace(SETTINGS, save_frames=True), tmp_path / "run"
    run(pipe_dir, out, make_samples(2), settings)
    made = file_digests(out)
    manifest = out / "manifest-0of1.jsonl"
    first, second = lines(out)
    path = out / first[key]
    for name in (f"{key}_sha256", key)[: 1 if lacking == "digest" else 2]:
        del first[name]
    path.write_bytes(b"something else")
    manifest.write_text("".join(json.dumps(line) + "\n" for line in (first, second)))
    capsys.readouterr()
    summary = run(pipe_dir, out, make_samples(2), settings)
    assert (summary.kept, summary.done) == (1, 1) and file_digests(out) == made
    said = " ".join(capsys.readouterr().err.split())
    assert ("has no digest of" if lacking == "digest" else f"names no {key}") in said and "is made again" in said
    assert run(pipe_dir, out, make_samples(2), settings).kept == 2


def test_a_run_grows_when_more_prompts_are_asked_for(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert run(pipe_dir, out, make_samples(2)).done == 2
    summary = run(pipe_dir, out, make_samples(4))
    assert (summary.kept, summary.done) == (2, 2)
    assert file_digests(out) == file_digests(whole_run)


@pytest.mark.parametrize(
    ("settings", "model", "named"),
    [
        (replace(SETTINGS, steps=4), MODEL, "steps was 3, now 4"),
        (replace(SETTINGS, seed=8), MODEL, "seed was 7, now 8"),
        (replace(SETTINGS, guidance_scale_2=2.5), MODEL, "guidance_scale_2 was 2.0, now 2.5"),
        (SETTINGS, ModelIdentity("random", "e" * 64), "checkpoint"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(whole_run: Path, settings, model, named: str):
    before = file_digests(whole_run), (whole_run / "run.json").read_bytes()
    with pytest.raises(PtqError, match=named):
        run_generation(never_load, make_samples(4), settings, whole_run, model=model)
    assert (file_digests(whole_run), (whole_run / "run.json").read_bytes()) == before


def test_a_run_that_another_version_began_is_refused(whole_run: Path, tmp_path: Path):
    out = copy_run(whole_run, tmp_path / "run")
    begun = json.loads((out / "run.json").read_text())
    begun["versions"]["ptq"] = "0.1.0"
    (out / "run.json").write_text(json.dumps(begun))
    wanted = (
        rf"version of ptq was '0\.1\.0', now '{__version__}'.* use the earlier versions to continue it, or pass --fresh"
    )
    with pytest.raises(PtqError, match=wanted):
        run_generation(never_load, make_samples(4), SETTINGS, out, model=MODEL)
    assert file_digests(out) == file_digests(whole_run)
    assert read_status(out).done == 4


def test_a_moved_model_is_the_same_model(whole_run: Path):
    moved = ModelIdentity("/another/place", MODEL.digest)
    assert run_generation(never_load, make_samples(4), SETTINGS, whole_run, model=moved).kept == 4


def test_another_prompt_or_dataset_under_the_same_ids_is_refused(whole_run: Path):
    samples = make_samples(4)
    changed = [*samples[:3], replace(samples[3], prompt="a blue cube")]
    with pytest.raises(PtqError, match=r"s3.*a red ball number 3.*a blue cube"):
        run_generation(never_load, changed, SETTINGS, whole_run, model=MODEL)
    other = [replace(sample, dataset="other") for sample in samples]
    with pytest.raises(PtqError, match="dataset was 'world', now 'other'"):
        run_generation(never_load, other, SETTINGS, whole_run, model=MODEL)


def test_fresh_deletes_what_the_run_made_and_only_that(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    out = copy_run(whole_run, tmp_path / "run")
    (out / "notes.txt").write_text("mine")
    (out / "videos" / "mine.mp4").write_bytes(b"mine")
    summary = run(pipe_dir, out, make_samples(2), replace(SETTINGS, steps=2), fresh=True)
    assert (summary.kept, summary.done) == (0, 2)
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.parent.name != "state")
    assert names == [
        "latents/s0-0.safetensors",
        "latents/s1-0.safetensors",
        "manifest-0of1.jsonl",
        "notes.txt",
        "run.json",
        "videos/mine.mp4",
        "videos/s0-0.mp4",
        "videos/s1-0.mp4",
    ]
    assert [line["steps"] for line in lines(out)] == [2, 2]


def test_a_directory_of_unknown_origin_is_refused(tmp_path: Path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "holiday.mp4").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no run\.json"):
        run_generation(never_load, make_samples(1), SETTINGS, tmp_path, model=MODEL)


@pytest.mark.parametrize("damage", [b"{broken\n", b'{"status": "done"}\n', b"[1]\n"])
def test_a_damaged_manifest_line_is_named_and_nothing_is_touched(whole_run: Path, tmp_path: Path, damage: bytes):
    out = copy_run(whole_run, tmp_path / "run")
    manifest = out / "manifest-0of1.jsonl"
    text = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join([text[0], damage, *text[2:]]))
    before = manifest.read_bytes()
    with pytest.raises(DamagedFileError, match="line 2 is damaged"):
        run_generation(never_load, make_samples(4), SETTINGS, out, model=MODEL)
    assert manifest.read_bytes() == before and file_digests(out) == file_digests(whole_run)


def test_following_the_advice_for_a_damaged_line_works(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    out = copy_run(whole_run, tmp_path / "run")
    manifest = out / "manifest-0of1.jsonl"
    text = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join([text[0], *text[2:]]))
    assert run(pipe_dir, out, make_samples(4)).done == 1
    assert file_digests(out) == file_digests(whole_run)


def test_a_line_that_points_outside_the_run_is_refused(whole_run: Path, tmp_path: Path):
    out = copy_run(whole_run, tmp_path / "run")
    (tmp_path / "precious.mp4").write_bytes(b"keep me")
    manifest = out / "manifest-0of1.jsonl"
    manifest.write_text(manifest.read_text().replace('"videos/s1-0.mp4"', '"../precious.mp4"'))
    with pytest.raises(DamagedFileError, match="outside"):
        run_generation(never_load, make_samples(4), replace(SETTINGS, steps=9), out, model=MODEL, fresh=True)
    assert (tmp_path / "precious.mp4").exists()


def test_a_damaged_run_json_is_named(whole_run: Path, tmp_path: Path):
    out = copy_run(whole_run, tmp_path / "run")
    (out / "run.json").write_text('{"digest": ')
    with pytest.raises(DamagedFileError, match=r"run\.json"):
        run_generation(never_load, make_samples(4), SETTINGS, out, model=MODEL)


@pytest.mark.parametrize(("limit", "file"), [(1800, r"latents/s1-0\.safetensors"), (2400, r"videos/s1-0\.mp4")])
def test_a_full_disk_stops_the_run_and_room_lets_it_continue(
    pipe_dir: Path, whole_run: Path, tmp_path: Path, limit: int, file: str
):
    """A limit on file sizes, as if the disk filled while a unit is written: one clear text, no half-written file."""
    out = copy_run(whole_run, tmp_path / "run")
    (out / "videos" / "s1-0.mp4").unlink()
    (out / "latents" / "s1-0.safetensors").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(PtqError, match=f"{file}: .*GB are free"):
            run(pipe_dir, out, make_samples(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(out.rglob("*.part")) and not list(out.rglob("s1-0.*"))
    assert len(lines(out)) == 4  # a full disk is no failure of the unit
    assert run(pipe_dir, out, make_samples(4)).done == 1
    assert file_digests(out) == file_digests(whole_run)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_tmpfs(pipe_dir: Path, whole_run: Path, tmp_path: Path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        with pytest.raises(PtqError, match=r"No space left.*GB are free"):
            run(pipe_dir, mount / "run", make_samples(12))
        made = [line for line in lines(mount / "run") if line["status"] == "done"]
        assert 0 < len(made) < 12 and not list(mount.rglob("*.part"))
        whole = file_digests(whole_run)
        found = file_digests(mount / "run")
        for line in made[:4]:
            assert found[line["video"]] == whole[line["video"]]
        subprocess.run(["mount", "-o", "remount,size=16m", str(mount)], check=True)
        summary = run(pipe_dir, mount / "run", make_samples(12))
        assert (summary.kept, summary.remaining) == (len(made), 0)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_plan_counts_without_writing_or_loading(whole_run: Path, tmp_path: Path):
    plan = plan_run(make_samples(6), SETTINGS, whole_run, samples_per_prompt=2)
    assert (plan.units, plan.own, plan.done, plan.to_make) == (12, 12, 4, 8)
    assert plan.seconds == pytest.approx(8 * sum(line["seconds"] for line in lines(whole_run)) / 4)
    # The estimate is meant to be on the safe side of what such a unit takes.
    size = sum(p.stat().st_size for p in whole_run.rglob("s0-0.*"))
    assert size / 4 < plan.bytes_per_unit < size * 4
    assert plan_run(make_samples(6), SETTINGS, tmp_path / "new").seconds is None
    assert not (tmp_path / "new").exists()


def test_status_of_a_run_with_failures(whole_run: Path, tmp_path: Path):
    out = copy_run(whole_run, tmp_path / "run")
    with open(out / "manifest-0of1.jsonl", "a") as file:
        file.write(json.dumps({**lines(out)[3], "unit": "world/s9/0", "status": "failed", "error": "no"}) + "\n")
    state = read_status(out)
    assert (state.units, state.done, state.remaining, state.failed) == (5, 4, 1, {"world/s9/0": "no"})
    (shard,) = state.shards
    assert (shard.tag, shard.done, shard.failed, shard.running) == ("0of1", 4, 1, False)
    mean = sum(line["seconds"] for line in lines(whole_run)) / 4
    assert shard.seconds_per_unit == pytest.approx(mean) and state.seconds_left == pytest.approx(mean)
    with pytest.raises(PtqError, match=r"no run\.json"):
        read_status(tmp_path)


def test_importing_the_package_loads_no_torch():
    program = "import sys, ptq.generation; print({'torch', 'diffusers', 'av'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "set()"
