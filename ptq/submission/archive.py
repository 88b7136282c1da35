"""Archives with reproducible bytes: members in name order, no times, owners or host names, fixed permissions."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from ptq.store.files import atomic_path

COMPRESSION = 1
"""4-bit codes hardly compress; level 1 costs little time and still shrinks text."""


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
