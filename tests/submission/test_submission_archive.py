"""Archives: reproducible bytes out, nothing unsafe in."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptq import limits
from ptq.cli.app import app
from ptq.errors import DamagedFileError
from ptq.submission.archive import write_archive
from ptq.submission.unpack import extract_archive

LIMIT = 10**6


def crafted(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def named(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_same_inputs_same_bytes_whatever_the_order_and_file_times(tmp_path):
    source = tmp_path / "file"
    source.write_bytes(b"content" * 100)
    write_archive(tmp_path / "a.tar.gz", {"x/one": source, "two.sh": b"#!"})
    source.touch()
    write_archive(tmp_path / "b.tar.gz", {"two.sh": b"#!", "x/one": source})
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()


def test_round_trip(tmp_path):
    write_archive(tmp_path / "a.tar.gz", {"x/one": b"1", "two": b"22"})
    assert extract_archive(tmp_path / "a.tar.gz", tmp_path / "out", LIMIT) == ["two", "x/one"]
    assert (tmp_path / "out/x/one").read_bytes() == b"1"


@pytest.mark.parametrize(
    "member",
    [
        named("../escape"),
        named("/absolute"),
        named("a/../../escape"),
        named("./dotted"),
        named("link", tarfile.SYMTYPE, "/etc/passwd"),
        named("hard", tarfile.LNKTYPE, "two"),
        named("device", tarfile.CHRTYPE),
        named("folder", tarfile.DIRTYPE),
    ],
    ids=lambda info: info.name,
)
def test_unsafe_members_are_refused_and_not_written(tmp_path, member):
    path = crafted(tmp_path / "bad.tar.gz", (member, b""))
    out = tmp_path / "out" / "inner"
    with pytest.raises(DamagedFileError, match="member"):
        extract_archive(path, out, LIMIT)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_repeated_member_is_refused(tmp_path):
    path = crafted(tmp_path / "bad.tar.gz", (named("one"), b"1"), (named("one"), b"2"))
    with pytest.raises(DamagedFileError, match="twice"):
        extract_archive(path, tmp_path / "out", LIMIT)


def test_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = crafted(tmp_path / "bomb.tar.gz", (named("zeros"), bytes(5 * LIMIT)))
    assert path.stat().st_size < LIMIT / 10
    with pytest.raises(DamagedFileError, match="--max-gb"):
        extract_archive(path, tmp_path / "out", LIMIT)
    assert not (tmp_path / "out/zeros").exists()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = named(name, kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def streamed(path: Path, *parts: bytes, level: int = 9) -> Path:
    with gzip.open(path, "wb", level) as stream:
        for part in parts:
            stream.write(part)
    return path


END = bytes(1024)
MB = 2**20


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        pytest.param([header("x", 60 * MB, b"x"), *[b"a" * MB] * 60], "extended header of 62914560 bytes", id="pax"),
        pytest.param([header("g", 10, b"g")], "not a plain file", id="global-pax"),
        pytest.param([header("L", 60 * MB, b"L"), *[b"a" * MB] * 60], "not a plain file", id="gnu-long-name"),
        pytest.param([header("s", 0, b"S")], "not a plain file", id="sparse"),
        pytest.param(
            [header("x", 20, b"x"), b"20 GNU.sparse.map=1\n".ljust(512, b"\0")], "other records", id="pax-sparse"
        ),
        pytest.param([header("x", 9, b"x"), b"9 path=a\n".ljust(512, b"\0")] * 3, "not a plain file", id="pax-chain"),
        pytest.param(
            [header("x", 13, b"x"), b"99999 path=a\n".ljust(512, b"\0")], "other records", id="pax-length-that-lies"
        ),
        pytest.param([header("big", 2**50)], "unpacks to more than", id="declared-size"),
        pytest.param(
            [header("negative", 0).replace(b"00000000000\0", b"\xff" * 12, 1)], "tar.gz archive|no size", id="negative"
        ),
        pytest.param([*[bytes(MB)] * 400], "follows the end", id="zeros-for-ever"),
        pytest.param(
            [header("a", 1), b"a".ljust(512, b"\0"), END, header("b", 1)], "follows the end", id="hidden-tail"
        ),
        pytest.param(
            [header("a", 1), b"a".ljust(512, b"\0"), header("a/b", 0), END], "a file and a folder", id="file-and-folder"
        ),
        pytest.param([header("a\x1b[2J", 0)], "control characters", id="escape"),
        pytest.param([header("a", 2000), b"a" * 512], "ends in the middle", id="truncated"),
    ],
)
def test_bombs_and_odd_headers_are_refused_at_once(tmp_path, parts: list[bytes], reason: str):
    path = streamed(tmp_path / "bad.tar.gz", *parts)
    started = time.process_time()
    with pytest.raises(DamagedFileError, match=reason):
        extract_archive(path, tmp_path / "out", 10**15)
    assert time.process_time() - started < 2
    assert sum(file.stat().st_size for file in tmp_path.rglob("out/*")) < MB


def test_zeros_beyond_any_ratio_of_weights_are_refused_before_they_are_written(tmp_path):
    path = streamed(tmp_path / "bomb.tar.gz", header("zeros", 100 * MB), *[bytes(MB)] * 100, END)
    with pytest.raises(DamagedFileError, match=f"more than {limits.ARCHIVE_RATIO} times"):
        extract_archive(path, tmp_path / "out", 10**15)
    assert not (tmp_path / "out/zeros").exists()


def test_more_members_than_any_submission_are_refused_in_linear_time(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ARCHIVE_MEMBERS", 2000)
    path = streamed(tmp_path / "many.tar.gz", *(header(f"m{i}", 0) for i in range(3000)), END, level=1)
    with pytest.raises(DamagedFileError, match="more than 2000 members"):
        extract_archive(path, tmp_path / "out", LIMIT)


def test_more_than_the_disk_has_is_refused_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))
    path = crafted(tmp_path / "a.tar.gz", (named("one"), bytes(51)))
    with pytest.raises(DamagedFileError, match="No more is free"):
        extract_archive(path, tmp_path / "out", LIMIT)


def test_long_names_are_read(tmp_path):
    name = "/".join(["folder" * 10] * 3)
    write_archive(tmp_path / "a.tar.gz", {name: b"1", "é/two": b"2"})
    assert set(extract_archive(tmp_path / "a.tar.gz", tmp_path / "out", LIMIT)) == {name, "é/two"}
    assert (tmp_path / "out" / name).read_bytes() == b"1"


@pytest.mark.parametrize("damage", ["truncate", "flip", "text"])
def test_damaged_archives_are_named(tmp_path, damage):
    path = tmp_path / "a.tar.gz"
    write_archive(path, {"one": bytes(range(256)) * 50})
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[len(data) // 2] ^= 0x40
    else:
        data = bytearray(b"not an archive")
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"a\.tar\.gz"):
        extract_archive(path, tmp_path / "out", LIMIT)


def test_a_dry_run_lists_what_is_packed(job, tmp_path):
    out = tmp_path / "submission.tar.gz"
    command = ["package", str(job.checkpoint), "--evaluation", str(job.evaluation), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--allow-failing-gate", "--dry-run"], catch_exceptions=False)
    rows = {line.split("│")[1].strip() for line in result.stdout.splitlines() if line.count("│") == 3}
    assert {"verdict", "weights", "evaluation", "source", "archive"} <= rows
    assert result.exit_code == 0 and not out.exists()
