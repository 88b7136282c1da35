"""Unpacking an archive without trusting whoever made it.

The tar stream is read here, header by header, because the library reads extended headers whole, whatever their size, and
follows kinds of members that a submission never has. What `write_archive` writes is read: plain files, and the extended
header of a long name. Everything else is refused before anything is written under that name; time and memory are linear
in what the limits allow.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Protocol

from ptq import limits
from ptq.errors import DamagedFileError, PtqError

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2**20
_EXTENDED_KEYS = {b"path", b"size"}
"""What an extended header may say; sparse files and character sets are among the rest."""


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Unsafe(ValueError):
    """Why a member is refused."""


def extract_archive(path: Path, target: Path, max_bytes: int) -> list[str]:
    """Unpack into an empty directory.

    Args:
        max_bytes: refuse archives that unpack to more.

    Returns:
        Names of the members.

    Raises:
        DamagedFileError: not a .tar.gz, damaged, or unsafe; names the member and the reason.
        PtqError: the disk that holds `target` is too small or not writable.
    """
    target.mkdir(parents=True, exist_ok=True)
    rooms = _rooms(path, target, max_bytes)
    names: dict[str, None] = {}
    total, name = 0, "the first"
    try:
        with gzip.open(path) as stream:
            while (header := _next_header(stream)) is not None:
                name, size = header
                _check_name(name, names)
                total += size
                _check_room(rooms, total, len(names) + 1)
                _copy(stream, target / name, size)
                names[name] = None
            _check_end(stream)
    except _Unsafe as error:
        raise DamagedFileError(
            f"{path}: {error}. Nothing of that was unpacked; ask for an archive as `ptq package` writes it."
        ) from error
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{path} is not a readable .tar.gz archive ({error}). Copy it again.") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedFileError(
            f"{path}: member {name!r} is a file and a folder at once. Ask for another archive."
        ) from error
    except OSError as error:
        raise PtqError(
            f"Could not unpack {path} into {target} at member {name!r}: {error.strerror or error}."
        ) from error
    return list(names)


def _rooms(path: Path, target: Path, max_bytes: int) -> list[tuple[int, str]]:
    """Bytes that may be unpacked, and what to say about more: the user's limit, the ratio, the disk."""
    size, free = path.stat().st_size, shutil.disk_usage(target).free
    return [
        (max_bytes, "If it is really that large, raise --max-gb"),
        (
            limits.ARCHIVE_SLACK_BYTES + limits.ARCHIVE_RATIO * size,
            f"That is more than {limits.ARCHIVE_RATIO} times the {size / 1e6:.1f} MB of the archive, which no weights are",
        ),
        (free, f"No more is free in {target}; free some space, or set TMPDIR to another disk"),
    ]


def _check_room(rooms: list[tuple[int, str]], total: int, members: int) -> None:
    for room, advice in rooms:
        if total > room:
            raise _Unsafe(f"it unpacks to more than {room / 1e9:.2f} GB. {advice}")
    if members > limits.ARCHIVE_MEMBERS:
        raise _Unsafe(f"it has more than {limits.ARCHIVE_MEMBERS} members")


def _next_header(stream: _Stream) -> tuple[str, int] | None:
    """Name and size of the next member, its data next in the stream; None at the end of the archive."""
    block = _exactly(stream, _BLOCK)
    if not block.strip(b"\0"):
        return None
    info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    said: dict[bytes, bytes] = {}
    if info.type == tarfile.XHDTYPE:
        said = _extended_header(stream, info)
        info = tarfile.TarInfo.frombuf(_exactly(stream, _BLOCK), "utf-8", "replace")
    name = said.get(b"path", info.name.encode()).decode()
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise _Unsafe(f"member {name!r} is not a plain file (links, devices, folders and other headers are refused)")
    size = said.get(b"size", b"%d" % info.size)
    if not size.isdigit() or len(size) > 18:
        raise _Unsafe(f"member {name!r} has no size that a file can have")
    return name, int(size)


def _extended_header(stream: _Stream, info: tarfile.TarInfo) -> dict[bytes, bytes]:
    """Records "length key=value\\n" of an extended header."""
    if not 0 <= info.size <= limits.ARCHIVE_NAME_BYTES:
        raise _Unsafe(
            f"member {info.name!r} is an extended header of {info.size} bytes, at most {limits.ARCHIVE_NAME_BYTES} are read"
        )
    left, said = _exactly(stream, _padded(info.size))[: info.size], {}
    while left:
        length, _, _ = left.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 6 else 0
        record = left[:size]
        key, equals, value = record.removeprefix(length + b" ").removesuffix(b"\n").partition(b"=")
        if len(record) != size or not equals or key not in _EXTENDED_KEYS or key in said or not record.endswith(b"\n"):
            raise _Unsafe(f"member {info.name!r} is an extended header with other records than a name and a size")
        said[key] = value
        left = left[len(record) :]
    return said


def _check_name(name: str, names: dict[str, None]) -> None:
    parts = PurePosixPath(name)
    problem = None
    if not name.isprintable() or len(name.encode()) > limits.ARCHIVE_NAME_BYTES:
        problem = "has control characters in its name, or a name too long"
    elif parts.is_absolute() or ".." in parts.parts or "\\" in name or str(parts) != name or name == ".":
        problem = "leads out of the archive"
    elif name in names:
        problem = "occurs twice"
    if problem is not None:
        raise _Unsafe(f"member {name[:200]!r} {problem}")


def _copy(stream: _Stream, destination: Path, size: int) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    with open(destination, "xb") as output:
        left = size
        while left:
            chunk = _exactly(stream, min(left, _CHUNK))
            output.write(chunk)
            left -= len(chunk)
    _exactly(stream, _padded(size) - size)


def _check_end(stream: _Stream) -> None:
    """Read to the end of the stream, where the checksum of all of it is: nothing but some zeros may follow."""
    left = limits.ARCHIVE_PADDING_BYTES
    while chunk := stream.read(_CHUNK):
        left -= len(chunk)
        if chunk.strip(b"\0") or left < 0:
            raise _Unsafe("something follows the end of its last member")


def _exactly(stream: _Stream, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("it ends in the middle of a member")
    return data


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
