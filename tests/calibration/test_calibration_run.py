"""A calibration directory survives kills, damage, changed settings and sharing, and ends with the same bytes."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from calibration_helpers import file_digests, load, make_plan, record
from children import start_child
from diffusers import UniPCMultistepScheduler
from safetensors import safe_open
from typer.testing import CliRunner

from ptq.calibration.run import CalibrationPlan, calibrate
from ptq.cli.main import app
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.prompts import read_prompts
from ptq.store.calibration import CalibrationSet
from ptq.store.sharding import Shard
from ptq.wan.presets import load_preset

REAL_PROMPTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "opens2v" / "OpenS2V-5M_to_mm.json"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A private copy of the finished records of five prompts."""
    return Path(shutil.copytree(whole, tmp_path / "records"))


def never():
    raise AssertionError("the model was loaded although nothing was left to record")


def test_what_lies_on_disk(t2v, whole):
    records = CalibrationSet(whole)
    assert len(records.records) == 5 * 4 and [sample.id for sample in records.info.samples] == [
        f"p{i}" for i in range(5)
    ]
    lines = [json.loads(line) for line in (whole / "records.jsonl").read_text().splitlines()]
    for number in range(5):
        with safe_open(whole / "records" / f"{number:05d}.safetensors", "pt") as handle:
            header = json.loads(handle.metadata()["records"])
            assert header == [line for line in lines if line["file"] == f"records/{number:05d}.safetensors"]
            names = {f"{line['record']}.{part}" for line in header for part in ("hidden_states", "timestep")}
            assert set(handle.keys()) == names | {"prompt_embeds"}
    settings = json.loads((whole / "calibration.json").read_text())
    schedule = {step["index"]: step for step in settings["schedule"]}
    assert len(schedule) == 6
    for line in lines:
        assert all(line[key] == schedule[line["step"]][key] for key in ("timestep", "sigma", "d_sigma", "expert"))
    records.verify()


def test_killed_recording_resumes_to_the_same_bytes(t2v, whole, tmp_path):
    for attempt in range(10):  # on a busy machine the child may be done before it is killed
        out = tmp_path / f"records-{attempt}"
        child = start_child(record, t2v, out, 5)
        deadline = time.monotonic() + 120
        while not list((out / "records").glob("0*.safetensors")):
            assert child.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        child.kill()
        child.join()
        if not (out / "records.jsonl").exists():
            break
    finished = file_digests(out / "records")
    assert not (out / "records.jsonl").exists() and len(list((out / "records").glob("0*.safetensors"))) < 5
    with pytest.raises(PtqError, match=r"has not finished.*again"):
        CalibrationSet(out)
    record(t2v, out, 5)
    for path in out.rglob(".*.part"):
        path.unlink()  # what the killed process was writing
    assert file_digests(out) == file_digests(whole)
    assert set(finished.items()) - set(file_digests(out / "records").items()) <= {
        item for item in finished.items() if item[0].startswith(".")
    }


def test_two_shards_give_the_records_of_one_process(t2v, whole, tmp_path):
    out = tmp_path / "records"
    assert not record(t2v, out, 5, shard=(1, 2))["complete"]
    assert sorted(p.name for p in (out / "records").iterdir()) == ["00001.safetensors", "00003.safetensors"]
    assert record(t2v, out, 5, shard=(0, 2))["complete"]
    assert file_digests(out) == file_digests(whole)
    # A shard without prompts has nothing to do, before and after the others.
    assert not calibrate(make_plan(t2v, 5), never, tmp_path / "empty", shard=Shard(6, 7))["complete"]
    assert calibrate(make_plan(t2v, 5), never, out, shard=Shard(6, 7))["complete"]


def test_finished_records_are_kept_without_loading_the_model(t2v, whole, copy):
    assert calibrate(make_plan(t2v, 5), never, copy)["complete"]
    assert file_digests(copy) == file_digests(whole)


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "removed", "not safetensors"])
@pytest.mark.parametrize("name", ["records/00003.safetensors", "negative.safetensors"])
def test_a_damaged_file_is_refused_and_recorded_again(t2v, whole, copy, damage, name):
    path = copy / name
    data = path.read_bytes()
    broken = {
        "truncated": data[: len(data) - 100],
        "flipped bit": data[:-50] + bytes([data[-50] ^ 1]) + data[-49:],
        "not safetensors": b"x" * 300,
    }
    path.unlink() if damage == "removed" else path.write_bytes(broken[damage])
    with pytest.raises(DamagedFileError, match=path.name):
        CalibrationSet(copy).verify()
    if damage != "flipped bit":
        records = CalibrationSet(copy)
        with pytest.raises(DamagedFileError, match=path.name):
            for item in records:
                records.load(item)
    assert record(t2v, copy, 5)["complete"]
    assert file_digests(copy) == file_digests(whole)


def unfinish(out: Path, *names: str) -> None:
    """As if killed: files of these names were never made, and the set is not complete."""
    path = out / "calibration.json"
    info = json.loads(path.read_text())
    info["complete"] = False
    del info["digest"]
    info["files"] = {name: value for name, value in info["files"].items() if name not in (*names, "records.jsonl")}
    path.write_text(json.dumps(info))
    for name in names:
        (out / "records" / name).unlink(missing_ok=True)
    (out / "records.jsonl").unlink()


def other_content(path: Path) -> None:
    """Another tensor value under the same header."""
    data = path.read_bytes()
    path.write_bytes(data[:-50] + bytes([data[-50] ^ 1]) + data[-49:])


@pytest.mark.parametrize("name", ["records/00001.safetensors", "negative.safetensors"])
@pytest.mark.parametrize("lacking", ["content", "digest"])
def test_a_file_of_an_unfinished_recording_is_compared_before_it_is_reused(t2v, whole, copy, capsys, name, lacking):
    unfinish(copy, *([] if name.startswith("negative") else ["00004.safetensors"]))
    if lacking == "digest":  # killed between the file and its digest
        info = json.loads((copy / "calibration.json").read_text())
        del info["files"][Path(name).name]
        (copy / "calibration.json").write_text(json.dumps(info))
    other_content(copy / name)
    capsys.readouterr()
    assert record(t2v, copy, 5)["complete"]
    assert file_digests(copy) == file_digests(whole)
    if name.startswith("records"):
        assert "00001.safetensors is not a file whose digest" in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_repair_keeps_the_digests_of_the_others(t2v, whole, copy):
    other_content(copy / "records/00003.safetensors")

    def stop():
        class Pipeline:
            def __getattr__(self, name):
                raise KeyboardInterrupt

        return Pipeline()

    with pytest.raises(KeyboardInterrupt):
        calibrate(make_plan(t2v, 5), stop, copy)
    other_content(copy / "records/00001.safetensors")
    assert record(t2v, copy, 5)["complete"]
    assert file_digests(copy) == file_digests(whole)


def test_a_file_of_another_shard_is_compared_before_the_set_is_complete(t2v, whole, copy):
    unfinish(copy, "00004.safetensors")
    other_content(copy / "records/00001.safetensors")  # of shard 1
    assert not record(t2v, copy, 5, shard=(0, 2))["complete"]
    assert record(t2v, copy, 5, shard=(1, 2))["complete"]
    assert file_digests(copy) == file_digests(whole)


def test_a_shard_that_starts_over_keeps_the_digests_of_the_others(t2v, whole, copy):
    plan, out = make_plan(t2v, 5), copy
    assert calibrate(plan, lambda: load(str(t2v)), out, shard=Shard(0, 2), fresh=True)["complete"]
    assert file_digests(out) == file_digests(whole)


def test_an_unfinished_recording_of_an_earlier_version_goes_on(t2v, whole, copy, capsys):
    """It noted no digests before the end: what has a whole header is kept, aloud, and compared from then on."""
    unfinish(copy, "00004.safetensors")
    info = json.loads((copy / "calibration.json").read_text())
    del info["files"]
    (copy / "calibration.json").write_text(json.dumps(info))
    (copy / "records/00003.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    assert not record(t2v, copy, 5, shard=(0, 2))["complete"]  # 00004 is its, 00003 is not
    said = " ".join(capsys.readouterr().err.split())
    assert "begun by an earlier version" in said and "4 files are kept by their headers alone" in said
    other_content(copy / "records/00001.safetensors")
    assert record(t2v, copy, 5, shard=(1, 2))["complete"]
    assert "earlier version" not in capsys.readouterr().err
    assert file_digests(copy) == file_digests(whole)


@pytest.mark.parametrize("damage", ["torn", "a line less", "removed"])
def test_a_damaged_index_is_refused_and_written_again_from_the_records(t2v, whole, copy, damage):
    index = copy / "records.jsonl"
    text = index.read_text()
    if damage == "removed":
        index.unlink()
    else:
        index.write_text(text[:-30] if damage == "torn" else "".join(text.splitlines(keepends=True)[:-1]))
    with pytest.raises(DamagedFileError, match=r"records\.jsonl.*ptq calibrate"):
        CalibrationSet(copy)
    assert calibrate(make_plan(t2v, 5), never, copy)["complete"]
    assert file_digests(copy) == file_digests(whole)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"records": 8}, "records_per_prompt"),
        ({"height": 64}, "preset"),
        ({"guidance_scale": 7.0}, "preset"),
        ({"count": 4}, r"samples \(5 there, 4 asked for: --num-prompts\)"),
    ],
)
def test_changed_settings_are_refused_by_name_and_nothing_is_touched(t2v, whole, copy, change, key):
    plan = make_plan(t2v, **{"count": 5, **change})
    with pytest.raises(UsageError, match=rf"other settings; different: {key}\..*--fresh"):
        calibrate(plan, never, copy)
    assert file_digests(copy) == file_digests(whole)


def test_another_model_is_refused_and_fresh_starts_over(pipelines, t2v, whole, copy):
    plan = make_plan(pipelines["TI2V-5B"], 5)
    with pytest.raises(UsageError, match=r"different: variant, experts"):
        calibrate(plan, never, copy)
    assert calibrate(make_plan(t2v, 5, seed=3), lambda: load(str(t2v)), copy, fresh=True)["complete"]
    assert file_digests(copy) != file_digests(whole)
    assert CalibrationSet(copy).info.seed == 3


def test_without_guidance_there_is_one_branch_and_resuming_records_nothing(t2v, tmp_path):
    out = tmp_path / "records"
    record(t2v, out, 2, guidance_scale=1.0)
    records = CalibrationSet(out)
    assert {r.branch for r in records} == {"cond"} and len(records.records) == 2 * 4
    assert not (out / "negative.safetensors").exists()
    calibrate(make_plan(t2v, 2, guidance_scale=1.0), never, out)


@pytest.mark.parametrize("kind", ["file", "foreign directory"])
def test_an_output_that_is_something_else_is_refused(t2v, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(UsageError, match="not a calibration directory"):
        calibrate(make_plan(t2v, 1), never, out)
    with pytest.raises(PtqError, match="not a calibration directory"):
        CalibrationSet(out)


def test_too_many_records_for_an_expert_stop_before_the_first_prompt(t2v, tmp_path):
    with pytest.raises(UsageError, match=r"steps of transformer\w* should be recorded"):
        record(t2v, tmp_path / "records", 2, records=20)
    assert not list((tmp_path / "records").glob("records/*"))


def test_a_full_disk_leaves_whole_files_only(t2v, whole, tmp_path, monkeypatch):
    def full(path, data):
        if ".safetensors." not in path.name:
            return write(path, data)
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    write = Path.write_bytes
    out = tmp_path / "records"
    record(t2v, out, 5, shard=(0, 2))
    with monkeypatch.context() as patch, pytest.raises(PtqError, match="No space left"):
        patch.setattr(Path, "write_bytes", full)
        record(t2v, out, 5, shard=(1, 2))
    assert sorted(p.name for p in (out / "records").iterdir()) == [f"{i:05d}.safetensors" for i in (0, 2, 4)]
    record(t2v, out, 5)
    assert file_digests(out) == file_digests(whole)


@pytest.mark.skipif(not REAL_PROMPTS.exists(), reason="the organisers' file is not beside the repository")
def test_the_organisers_file(t2v, tmp_path):
    found = read_prompts(REAL_PROMPTS, limit=8)
    base = make_plan(t2v, 1, records=4)
    plan = CalibrationPlan(base.layout, base.preset, found.samples, 4, 0, {"name": found.path.name, "sha256": "0"})
    calibrate(plan, lambda: load(str(t2v)), tmp_path / "records")
    records = CalibrationSet(tmp_path / "records")
    assert {r.sample_id for r in records.records} == {sample.id for sample in found.samples} and len(
        records.records
    ) == 32
    first, second = (records.load(r).encoder_hidden_states for r in records.records[::4][:2])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("options", [(), ("--flow-shift", "2.5")])
def test_the_schedule_is_that_of_the_settings_not_of_the_file(t2v, tmp_path, options):
    """As in generation: hub directories come with a shift of their own in scheduler_config.json."""
    model = Path(shutil.copytree(t2v, tmp_path / "model"))
    path = model / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "flow_shift": 7.0}))
    wanted = float(options[1]) if options else load_preset("T2V-A14B").flow_shift
    (tmp_path / "prompts.txt").write_text("a red ball rolls\n")
    command = ["calibrate", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "records")]
    small = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "6", "--records-per-prompt", "4"]
    result = CliRunner().invoke(app, [*command, *small, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    scheduler = UniPCMultistepScheduler.from_config(config, flow_shift=wanted)
    scheduler.set_timesteps(6)
    settings = json.loads((tmp_path / "records" / "calibration.json").read_text())
    assert [step["sigma"] for step in settings["schedule"]] == pytest.approx(scheduler.sigmas[:-1].tolist())
    assert settings["preset"]["flow_shift"] == wanted


def test_guidance_of_an_expert_that_is_not_there_is_refused(pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball rolls\n")
    command = ["calibrate", str(pipelines["TI2V-5B"]), "--prompts", str(tmp_path / "prompts.txt")]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "records"), "--guidance-scale-2", "3"])
    assert isinstance(result.exception, UsageError) and "one expert" in str(result.exception)


def test_a_packed_model_is_refused(packed, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball rolls\n")
    command = ["calibrate", str(packed["mxfp4"]), "--prompts", str(tmp_path / "prompts.txt")]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "records"), "--dry-run"])
    assert isinstance(result.exception, UsageError) and "packed checkpoint" in str(result.exception)


@pytest.mark.parametrize(("given", "taken"), [((), 48), (("--num-prompts", "50"), 50), (("--num-prompts", "90"), 60)])
def test_a_long_file_is_not_recorded_whole_unless_asked_for(given, taken, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red ball number {i}\n" for i in range(60)))
    arguments = ["calibrate", "tiny", "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--dry-run", *given]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and f"{taken} of prompts.txt" in result.output
