"""A generation directory: its files, what decides them, and what starting over deletes.

A directory holds one run: one model, one dataset, one set of settings. `fresh` deletes the files that the run made, and
nothing else.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptq import ui
from ptq.errors import PtqError
from ptq.generation.claims import units_in_work
from ptq.generation.settings import Settings
from ptq.generation.units import Unit
from ptq.store.files import digest
from ptq.store.lora import lora_identity, without_paths
from ptq.store.run_directory import SHOWN_DIFFERENCES, Difference, RunDirectory
from ptq.store.run_info import FILE, CheckpointInfo, RunInfo, RunPlan, read_run_info
from ptq.store.run_manifest import FILE_KEYS, PATTERN, manifest_name, read_lines
from ptq.store.sharding import Shard
from ptq.version import __version__
from ptq.wan.attention import PACKAGE, SLOTS
from ptq.wan.identity import ModelIdentity

SUFFIXES = {"videos": ".mp4", "latents": ".safetensors", "frames": ".npz"}
"""Folder -> ending of the file that a unit has in it."""
_VERSION_OF = "the version of "
_PACKAGES = ("torch", "diffusers", "transformers", "av")


def describe_run(settings: Settings, model: ModelIdentity, dataset: str, plan: RunPlan) -> RunInfo:
    """The content of run.json; `digest` is over everything that decides pixels.

    The model's name and path are left out of the digest: a moved checkpoint is the same checkpoint.
    """
    packages = (*_PACKAGES, PACKAGE) if settings.attention_backend in SLOTS else _PACKAGES
    versions = {"ptq": __version__, **{name: importlib.metadata.version(name) for name in packages}}
    decisive = {
        "checkpoint_digest": model.digest,
        "dataset": dataset,
        "settings": settings.as_json(),
        "versions": versions,
        **lora_identity(model.loras),
    }
    return RunInfo(
        schema=1,
        model=model.model,
        checkpoint=CheckpointInfo(digest=model.digest, format=model.format),
        lora=without_paths(model.loras),
        dataset=dataset,
        settings=settings.as_json(),
        versions=versions,
        digest=digest(decisive),
        not_applied="input image pasted over frame 0, latent reset, high-precision warm-up steps or outlier columns",
        plan=plan,
    )


def comparable(info: RunInfo) -> dict[str, Any]:
    """What the digest covers, flat, under the names of the messages."""
    return {
        "the checkpoint": (info.checkpoint.digest or "")[:16],
        **{f"the LoRA of {expert}": f"{one.sha256[:16]} at {one.strength:g}" for expert, one in info.lora.items()},
        "the dataset": info.dataset,
        **info.settings,
        **{f"{_VERSION_OF}{name}": version for name, version in info.versions.items()},
    }


class GenerationDirectory(RunDirectory):
    """Paths and life of one run.

    Args:
        info: what is asked for; None only reads. units: those of this shard.
    """

    kind, settings_file = "generation directory", FILE

    def __init__(
        self, path: str | Path, info: RunInfo | None = None, shard: Shard | None = None, units: Sequence[Unit] = ()
    ) -> None:
        super().__init__(path, shard)
        self._info, self._units = info, units

    def file(self, folder: str, stem: str) -> Path:
        """Path of a unit's file in `videos`, `latents` or `frames`."""
        return self.path / folder / f"{stem}{SUFFIXES[folder]}"

    def free_bytes(self) -> int:
        """Free space of the disk that holds (or will hold) the directory."""
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free

    def found(self) -> dict[str, Any] | None:
        """What decided the videos that are there."""
        return comparable(read_run_info(self.path)) if self.settings_path.exists() else None

    def foreign(self) -> str | None:
        """Folders and files of a run whose run.json is gone; files of other names are let be."""
        for folder in SUFFIXES:
            if any((self.path / folder).glob("[!.]*")):
                return f"{self.path / folder} holds files but there is no {FILE} beside it, so it is not known what made them. Choose another --out, or move them away."
        found = next(self.path.glob(PATTERN), None)
        return None if found is None else f"{found} has no {FILE} beside it. Choose another --out, or restore {FILE}."

    def refusal(self, different: list[Difference]) -> PtqError:
        listed = "; ".join(
            f"{ui.shorten(name)} was {ui.shorten(repr(before))}, now {ui.shorten(repr(after))}"
            for name, before, after in different[:SHOWN_DIFFERENCES]
        )
        again = (
            "use the earlier versions"
            if any(one.name.startswith(_VERSION_OF) for one in different)
            else "ask for the same again"
        )
        return PtqError(
            f"{self.path} holds a run that was made differently: {listed}. Videos of two kinds are never mixed: choose another --out, {again} to continue it, or pass --fresh to delete it and start over."
        )

    def delete(self, *, own: bool) -> None:
        """Own: the files of this shard's units. Else what the manifests name, files of unfinished units included."""
        if own:
            (self.path / manifest_name(self.shard)).unlink(missing_ok=True)
            for unit in self._units:
                self._delete_files(unit.stem)
            return
        for line in read_lines(self.path).values():
            for key in FILE_KEYS:
                if getattr(line, key):
                    (self.path / getattr(line, key)).unlink(missing_ok=True)
        for claim in self.state.glob("*.claim"):  # units in work when their process died: files without a line
            self._delete_files(claim.name.removesuffix(".claim"))
            claim.unlink()
        for path in (self.settings_path, *self.path.glob(PATTERN)):
            path.unlink(missing_ok=True)

    def _delete_files(self, stem: str) -> None:
        for folder in SUFFIXES:
            self.file(folder, stem).unlink(missing_ok=True)

    def targets(self) -> set[Path]:
        """Files of this shard's units, but for those that another shard claims: it may be writing them now."""
        claimed = {stem for tag, stem in units_in_work(self.state).items() if tag != self.shard.tag}
        stems = {unit.stem for unit in self._units} - claimed
        return {self.file(folder, stem) for folder in SUFFIXES for stem in stems}

    def write_settings(self, *, anew: bool) -> None:
        """Always: the plan may be another one."""
        assert self._info is not None
        self._info.write(self.settings_path)
