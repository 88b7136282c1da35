"""Atomic files, torn JSON lines, a full disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ptq.errors import DamagedFileError, PtqError
from ptq.store import files as fs


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_file_appears_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.bin"
    with fs.atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists() and temporary.parent == target.parent
    assert target.read_bytes() == b"half" and names(target.parent) == ["file.bin"]


def test_error_keeps_the_old_content_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    fs.write_bytes(target, b"old")
    with pytest.raises(ZeroDivisionError), fs.atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        raise ZeroDivisionError
    assert target.read_bytes() == b"old" and names(tmp_path) == ["file.bin"]


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files (EFBIG) stands in for the full disk: both are an OSError of write()."""
    fs.write_bytes(tmp_path / "file.bin", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(PtqError, match=r"Could not write .*file\.bin.*GB are free"):
            fs.write_bytes(tmp_path / "file.bin", b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "file.bin").read_bytes() == b"old" and names(tmp_path) == ["file.bin"]


def test_unwritable_place_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(PtqError, match="Could not write"):
        fs.write_json(tmp_path / "file" / "below.json", {})
    assert names(tmp_path) == ["file"]


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    code = (
        "import os, signal, sys\nfrom ptq.store.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n    t.write_bytes(b'new')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"


def test_json_round_trip_refuses_nan(tmp_path: Path) -> None:
    fs.write_json(tmp_path / "a.json", {"b": [1, "é"]})
    assert fs.read_json(tmp_path / "a.json") == {"b": [1, "é"]}
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")
    with pytest.raises(ValueError, match="JSON"):
        fs.write_json(tmp_path / "a.json", {"b": float("nan")})
    assert fs.read_json(tmp_path / "a.json") == {"b": [1, "é"]}


def test_bad_json_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=r"a\.json does not exist"):
        fs.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(DamagedFileError, match=r"a\.json.*line 2"):
        fs.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'"\xff"')
    with pytest.raises(DamagedFileError, match=r"a\.json"):
        fs.read_json(tmp_path / "a.json")


def test_torn_last_line_is_ignored_at_every_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    records = [{"n": 0, "text": "é\n"}, {"n": 1, "text": "b"}]
    for record in records:
        fs.append_jsonl(path, record)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert fs.read_jsonl(path) == records[:1]
    assert fs.read_jsonl(tmp_path / "absent.jsonl") == []


def test_appending_after_a_torn_line_loses_no_record(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": 1, "te')
    fs.append_jsonl(path, {"n": 2})
    assert fs.read_jsonl(path, skip_damaged=True) == [{"n": 0}, {"n": 2}]


@pytest.mark.parametrize("line", [b"{oops}", b"[1]", b"\xff"])
def test_damaged_middle_line_is_refused_by_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 0}\n\n' + line + b'\n{"n": 1}\n')
    with pytest.raises(DamagedFileError, match=r"lines\.jsonl, line 3"):
        fs.read_jsonl(path)
    assert fs.read_jsonl(path, skip_damaged=True) == [{"n": 0}, {"n": 1}]


def test_concurrent_writers_of_one_target_leave_one_whole_file(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ptq.store.files import write_bytes\n"
        "for _ in range(50): write_bytes(sys.argv[1], sys.argv[2].encode() * 9999)"
    )
    target = tmp_path / "file.bin"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(target), letter]) for letter in "ab"]
    seen: set[bytes] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if target.exists():
                seen.add(target.read_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    codes = [writer.wait() for writer in writers]
    stop.set()
    thread.join()
    assert codes == [0, 0] and seen <= {b"a" * 9999, b"b" * 9999} and seen
    assert names(tmp_path) == ["file.bin"]


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert fs.sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert fs.digest({"a": 1, "b": [2]}) == fs.digest(json.loads('{"b":[2],"a":1}')) != fs.digest({"a": 1, "b": [3]})


def test_temporary_name_is_of_this_process(tmp_path: Path) -> None:
    with fs.atomic_path(tmp_path / "x") as temporary:
        temporary.write_bytes(b"")
        assert str(os.getpid()) in temporary.name and temporary.name.endswith(fs.PARTIAL_SUFFIX)
