"""Archives with reproducible bytes, and unpacking them without trusting whoever made them.

Writing: members in name order, no times, owners or host names, fixed permissions, so the same inputs give the same bytes.
Reading: absolute paths, "..", links, devices, repeated names and more data than the limit are refused before anything
is written under that name.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ptq.errors import DamagedFileError
from ptq.store.files import atomic_path

COMPRESSION = 1
"""4-bit codes hardly compress; level 1 costs little time and still shrinks text."""
MAX_MEMBERS = 100_000


def write_archive(path: Path, members: Mapping[str, Path | bytes]) -> None:
    """Write a .tar.gz.

    Args:
        path: target, replaced atomically.
        members: name inside the archive -> a file or bytes.

    Raises:
        PtqError: the disk is full or not writable.
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=COMPRESSION, fileobj=raw, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(members):
            source = members[name]
            info = tarfile.TarInfo(name)
            info.mode = 0o755 if name.endswith(".sh") else 0o644
            if isinstance(source, bytes):
                info.size = len(source)
                archive.addfile(info, io.BytesIO(source))
            else:
                info.size = source.stat().st_size
                with open(source, "rb") as handle:
                    archive.addfile(info, handle)


def extract_archive(path: Path, target: Path, max_bytes: int) -> list[str]:
    """Unpack into an empty directory.

    Args:
        max_bytes: refuse archives that unpack to more.

    Returns:
        Names of the members.

    Raises:
        DamagedFileError: not a .tar.gz, damaged, or unsafe; names the member and the reason.
    """
    names: list[str] = []
    total = 0
    try:
        with gzip.open(path) as compressed, tarfile.open(fileobj=compressed, mode="r:") as archive:
            for member in archive:
                _check_member(path, member, names)
                total += member.size
                if total > max_bytes or len(names) > MAX_MEMBERS:
                    raise DamagedFileError(
                        f"{path} unpacks to more than {max_bytes / 1e9:.1f} GB or {MAX_MEMBERS} files, at member {member.name}. If it is really that large, raise --max-gb."
                    )
                destination = target / member.name
                destination.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None  # a regular file, checked above
                with open(destination, "wb") as output:
                    shutil.copyfileobj(source, output)
                names.append(member.name)
            while compressed.read(2**20):
                pass  # to the end of the stream, where the checksum of all of it is
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DamagedFileError(f"{path} is not a readable .tar.gz archive ({error}).") from error
    return names


def _check_member(path: Path, member: tarfile.TarInfo, names: list[str]) -> None:
    parts = PurePosixPath(member.name)
    problem = None
    if not member.isreg():
        problem = "is not a plain file (links, devices and folders are refused)"
    elif parts.is_absolute() or ".." in parts.parts or "\\" in member.name or str(parts) != member.name:
        problem = "leads out of the archive"
    elif member.name in names:
        problem = "occurs twice"
    if problem is not None:
        raise DamagedFileError(f"{path}: member {member.name!r} {problem}. Nothing of it was unpacked.")
