"""Archives: reproducible bytes out, nothing unsafe in."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

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
