"""The unfinished checkpoint: finished blocks under `<out>.partial`, tied to what they were made from.

The output directory itself appears only when everything is in it. A killed run leaves `<out>.partial`; the same command
finds it, checks its signature and goes on with the first block that is not there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from ptq import ui
from ptq.checkpoint.manifest import MANIFEST_FILE, BlockEntry, LayerEntry, read_manifest
from ptq.checkpoint.safetensors_file import TensorEntry, read_header
from ptq.errors import DamagedFileError, UsageError
from ptq.store.files import (
    PARTIAL_SUFFIX,
    digest,
    read_json,
    sha256_file,
    sweep_partials,
    sync_directory,
    write_json,
    write_tensors,
)
from ptq.store.run_directory import Difference, RunDirectory, name_all
from ptq.store.schema import Count, NotNegative, Schema
from ptq.store.sensitivity import PROTECTION_FILE

if TYPE_CHECKING:
    from torch import Tensor

SIGNATURE_FILE = "run.json"
BLOCKS_DIR = "blocks"
STREAMS_DIR = "streams"
RUN_FILES = (SIGNATURE_FILE, PROTECTION_FILE, BLOCKS_DIR, STREAMS_DIR)
"""What only a running job needs; never part of the checkpoint."""


class InputGains(Schema):
    """What residual blocks of one input are worth, as `ptq.solvers.residual.BlockGains`; linears: that read it."""

    linears: list[str]
    gains: list[NotNegative]
    rows: Count
    sensitivity: NotNegative


class FinishedBlock(Schema):
    """`blocks/<expert>/<index>.json`: the manifest's rows of a block; it commits the tensors beside it.

    inputs: with residual blocks, which are chosen when every block is finished.
    tensors_sha256: of that file; absent in earlier versions, whose unfinished blocks are made again.
    """

    block: BlockEntry
    layers: list[LayerEntry]
    inputs: list[InputGains] = Field(default=[])
    tensors_sha256: str | None = None


def refuse_taken(out: Path) -> None:
    """Refuse a directory that something is in already.

    Raises:
        UsageError: there is something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists already and is not empty. Finished checkpoints are never overwritten: choose another --out, or delete it first."
        )


def unfinished(out: Path) -> Path:
    """Where the checkpoint `out` lies while it is made."""
    return out.with_name(out.name + ".partial")


class WorkDir(RunDirectory):
    """Finished blocks of one run.

    Args:
        out: the final output directory.
        signature: everything that decides the codes, as JSON-like values under readable names.

    Raises:
        UsageError: `out` exists already.
    """

    kind, settings_file = "work directory of `ptq quantize`", SIGNATURE_FILE

    def __init__(self, out: Path, signature: dict[str, Any]) -> None:
        super().__init__(unfinished(out))
        self.out, self._made_from, self.signature = out, signature, digest(signature)
        refuse_taken(out)

    def begin(self, *, fresh: bool = False) -> None:
        """Continue the unfinished run that is there, or start one.

        Args:
            fresh: throw an earlier unfinished run away.

        Raises:
            UsageError: something else is there, or an unfinished run with another signature (names the differences).
        """
        self.refuse_foreign()
        self.write_settings(anew=self.enter(self._made_from, fresh=fresh))

    def found(self) -> dict[str, Any] | None:
        """The signature of the run that is there."""
        if not self.settings_path.exists():
            return None
        signature = read_json(self.settings_path)
        if not (isinstance(signature, dict) and isinstance(signature.get("versions"), dict)):
            raise DamagedFileError(
                f"{self.settings_path} does not say what the unfinished run is made from. Pass --fresh to start over, or choose another --out."
            )
        return signature

    def foreign(self) -> str | None:
        """Other files; a checkpoint that only lacks its final name, or what a killed process was writing, is none."""
        written = any(not path.name.endswith(PARTIAL_SUFFIX) for path in self.path.iterdir())
        return super().foreign() if written and not self.is_complete else None

    def refusal(self, different: list[Difference]) -> UsageError:
        """What is said of another signature: of other versions first."""
        versions = next((one for one in different if one.name == "versions"), None)
        before, now = (each.get("wan-ptq") for each in (versions.before, versions.after)) if versions else (None, None)
        if before != now:
            return UsageError(
                f"{self.path} holds an unfinished run of wan-ptq {ui.shorten(str(before))}, and this is {now}, whose codes may differ. Blocks of two versions are never mixed: finish it with the version that began it, choose another --out, or pass --fresh to start over."
            )
        return UsageError(
            f"{self.path} holds an unfinished run made from something else; different: {name_all(different)}. Blocks of two runs are never mixed: use the earlier settings to finish it, choose another --out, or pass --fresh to start over."
        )

    def delete(self, *, own: bool) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def write_settings(self, *, anew: bool) -> None:
        if anew and not self.is_complete:
            write_json(self.settings_path, self._made_from)

    @property
    def is_complete(self) -> bool:
        """Everything is written, only `finish` was interrupted."""
        return (self.path / MANIFEST_FILE).exists() and read_manifest(self.path).signature == self.signature

    def _files(self, expert: str, block: int) -> tuple[Path, Path]:
        stem = self.path / BLOCKS_DIR / expert / f"{block:05d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def merged_file(self, expert: str) -> Path:
        """Where tensors of an expert lie that nothing but a LoRA changed, until its shards are written."""
        return self.path / BLOCKS_DIR / expert / "merged.safetensors"

    def save_block(self, expert: str, block: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Store a finished block: its changed tensors (full names), and its statistics as `FinishedBlock`."""
        weights, statistics = self._files(expert, block)
        write_tensors(weights, tensors)
        finished = FinishedBlock.model_validate({**info, "tensors_sha256": sha256_file(weights)})
        write_json(statistics, finished.model_dump(mode="json"))

    def load_block(self, expert: str, block: int) -> tuple[dict[str, TensorEntry], dict[str, Any]] | None:
        """Entries and statistics of a finished block; None when it is not there or damaged (it is then made again)."""
        weights, statistics = self._files(expert, block)
        if not (weights.exists() and statistics.exists()):
            return None
        try:
            info = FinishedBlock.model_validate(read_json(statistics))
            if info.tensors_sha256 != sha256_file(weights):
                raise DamagedFileError(f"{weights} is not the file that was written")
            return read_header(weights), info.model_dump(mode="json", exclude={"tensors_sha256"})
        except (DamagedFileError, ValidationError):
            ui.warn(f"Block {block} of {expert} was damaged or is of an earlier version; it is made again.")
            return None

    def remove_leftovers(self) -> None:
        """Remove what killed processes were writing. Only while no other process writes."""
        sweep_partials(self.path)

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
