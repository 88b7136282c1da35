"""The unfinished checkpoint: finished blocks under `<out>.partial`, tied to what they were made from.

The output directory itself appears only when everything is in it. A killed run leaves `<out>.partial`; the same command
finds it, checks its signature and goes on with the first block that is not there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ptq.calibration.records import save_atomic
from ptq.checkpoint.manifest import MANIFEST_FILE, read_manifest
from ptq.checkpoint.safetensors_file import TensorEntry, read_header
from ptq.errors import DamagedFileError, UsageError
from ptq.store.files import PARTIAL_SUFFIX, digest, read_json, sync_directory, write_json

SIGNATURE_FILE = "run.json"
BLOCKS_DIR = "blocks"
PROTECTION_FILE = "protection.json"
STREAMS_DIR = "streams"
RUN_FILES = (SIGNATURE_FILE, PROTECTION_FILE, BLOCKS_DIR, STREAMS_DIR)
"""What only a running job needs; never part of the checkpoint."""


class WorkDir:
    """Finished blocks of one run.

    Args:
        out: the final output directory.
        signature: everything that decides the codes, as JSON-like values under readable names.
        fresh: throw an earlier unfinished run away.

    Raises:
        UsageError: `out` exists already, or an unfinished run with another signature is there (names the differences).
    """

    def __init__(self, out: Path, signature: dict[str, Any], *, fresh: bool = False) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(
                f"{out} exists already and is not empty. Finished checkpoints are never overwritten: choose another --out, or delete it first."
            )
        if fresh:
            shutil.rmtree(self.path, ignore_errors=True)
        found = read_json(self.path / SIGNATURE_FILE) if (self.path / SIGNATURE_FILE).exists() else None
        if found is not None and found != signature:
            keys = sorted(set(found) | set(signature))
            different = [key for key in keys if found.get(key) != signature.get(key)]
            raise UsageError(
                f"{self.path} holds an unfinished run made from something else; different: {', '.join(different)}. Blocks of two runs are never mixed: use the earlier settings to finish it, choose another --out, or pass --fresh to start over."
            )
        self.signature = digest(signature)
        if found is None and not self.is_complete:
            write_json(self.path / SIGNATURE_FILE, signature)

    @property
    def is_complete(self) -> bool:
        """Everything is written, only `finish` was interrupted."""
        return (self.path / MANIFEST_FILE).exists() and read_manifest(self.path).signature == self.signature

    def _files(self, expert: str, block: int) -> tuple[Path, Path]:
        stem = self.path / BLOCKS_DIR / expert / f"{block:05d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def save_block(self, expert: str, block: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Store a finished block: its changed tensors (full names) and its statistics. The JSON file commits it."""
        weights, statistics = self._files(expert, block)
        save_atomic(tensors, weights)
        write_json(statistics, info)

    def load_block(self, expert: str, block: int) -> tuple[dict[str, TensorEntry], dict[str, Any]] | None:
        """Entries and statistics of a finished block; None when it is not there or damaged (it is then made again)."""
        weights, statistics = self._files(expert, block)
        if not (weights.exists() and statistics.exists()):
            return None
        try:
            return read_header(weights), read_json(statistics)
        except DamagedFileError:
            return None

    def remove_leftovers(self) -> None:
        """Remove what killed processes were writing. Only while no other process writes."""
        for leftover in self.path.rglob(f".*{PARTIAL_SUFFIX}"):
            leftover.unlink()

    def finish(self) -> None:
        """Remove what only a running job needs and give the directory its final name."""
        for name in (STREAMS_DIR, BLOCKS_DIR):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (SIGNATURE_FILE, PROTECTION_FILE):
            (self.path / name).unlink(missing_ok=True)
        if self.out.exists():
            self.out.rmdir()  # an empty directory the user made
        self.path.rename(self.out)
        sync_directory(self.out.parent)
