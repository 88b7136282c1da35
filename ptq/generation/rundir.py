"""A generation directory: its paths, `run.json`, and the rules for starting, continuing and starting over.

A directory holds one run: one model, one dataset, one set of settings. Whoever continues it must ask for the same, or is
refused with the differences named. `fresh` deletes the files that the run made, and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.generation.claims import units_in_work
from ptq.generation.manifest import FILE_KEYS, Manifests, manifest_name
from ptq.generation.settings import ModelIdentity, Settings
from ptq.generation.units import Unit
from ptq.store.files import PARTIAL_SUFFIX, digest, read_json, write_json
from ptq.store.locks import ShardLock, directory_mutex, live_shards, refuse_other_counts
from ptq.store.sharding import Shard
from ptq.version import __version__

SCHEMA = 1
SUFFIXES = {"videos": ".mp4", "latents": ".safetensors", "frames": ".npz"}
_PACKAGES = ("torch", "diffusers", "transformers", "av")


def describe_run(settings: Settings, model: ModelIdentity, dataset: str) -> dict[str, Any]:
    """The content of `run.json` without `plan`; `digest` is over everything that decides pixels.

    The model's name and path are left out of the digest: a moved checkpoint is the same checkpoint.
    """
    decisive = {
        "checkpoint_digest": model.digest,
        "dataset": dataset,
        "settings": settings.as_json(),
        "versions": {"ptq": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
    }
    return {
        "schema": SCHEMA,
        "model": model.model,
        "checkpoint": {"digest": model.digest, "format": model.format},
        **{key: value for key, value in decisive.items() if key != "checkpoint_digest"},
        "digest": digest(decisive),
        "not_applied": "input image pasted over frame 0, latent reset, high-precision warm-up steps or outlier columns",
    }


class RunDirectory:
    """Paths and life of one run. `state/` holds locks and claims; it may be deleted when no process runs."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.state = self.root / "state"
        self.info_path = self.root / "run.json"

    def file(self, folder: str, stem: str) -> Path:
        """Path of a unit's file in `videos`, `latents` or `frames`."""
        return self.root / folder / f"{stem}{SUFFIXES[folder]}"

    def read_info(self) -> dict[str, Any]:
        """`run.json`.

        Raises:
            PtqError: there is none. DamagedFileError: it is not one of this package.
        """
        if not self.info_path.is_file():
            raise PtqError(f"{self.root} is not a generation directory: it has no run.json.")
        info = read_json(self.info_path)
        if not isinstance(info, dict) or not isinstance(info.get("digest"), str) or "settings" not in info:
            raise DamagedFileError(f"{self.info_path} is damaged: it has no digest or no settings.")
        return info

    @contextmanager
    def open_shard(
        self, shard: Shard, info: dict[str, Any], plan: dict[str, Any], units: Iterable[Unit], *, fresh: bool
    ) -> Iterator[None]:
        """Hold a shard of this run while the block runs; checks, then writes `run.json`, before it starts.

        Args:
            info: from `describe_run`. plan: what is to be made, for `ptq status`; not compared.
            units: the shard's units, whose leftovers of killed writers are removed.
            fresh: start over instead of continuing.

        Raises:
            PtqError: another process makes this shard, or shards of another N; the run differs; foreign videos.
        """
        lock = ShardLock(self.state, shard)
        with directory_mutex(self.state):
            lock.acquire()
            try:
                self._enter(shard, info, list(units), fresh)
                write_json(self.info_path, {**info, "plan": plan})
            except BaseException:
                lock.release()
                raise
        try:
            yield
        finally:
            lock.release()

    def _enter(self, shard: Shard, info: dict[str, Any], units: list[Unit], fresh: bool) -> None:
        others = [tag for tag in live_shards(self.state) if tag != shard.tag]
        refuse_other_counts(self.state, shard)
        if not self.info_path.exists():
            self._refuse_foreign_files()
        else:
            old = self.read_info()
            if old["digest"] != info["digest"]:
                if not fresh:
                    raise PtqError(self._describe_difference(old, info))
                if others:
                    raise PtqError(
                        f"--fresh would delete what shard {', '.join(others)} is making in {self.root} with other settings. Stop it first, or choose another --out."
                    )
                self._delete_all()
            elif fresh and shard.count == 1:
                self._delete_all()
            elif fresh:
                (self.root / manifest_name(shard)).unlink(missing_ok=True)
                self._delete_units(units)
        self._sweep_partials(shard, units)

    def _refuse_foreign_files(self) -> None:
        for folder in SUFFIXES:
            if any((self.root / folder).glob("[!.]*")):
                raise UsageError(
                    f"{self.root / folder} holds files but there is no run.json beside it, so it is not known what made them. Choose another --out, or move them away."
                )
        found = next(self.root.glob("manifest-*.jsonl"), None)
        if found is not None:
            raise UsageError(f"{found} has no run.json beside it. Choose another --out, or restore run.json.")

    def _describe_difference(self, old: dict[str, Any], new: dict[str, Any]) -> str:
        differences = list(_differences(_comparable(old), _comparable(new)))
        listed = "; ".join(f"{name} was {before!r}, now {after!r}" for name, before, after in differences)
        return f"{self.root} holds a run that was made differently: {listed}. Videos of two kinds are never mixed: choose another --out, ask for the same again to continue it, or pass --fresh to delete it and start over."

    def _delete_all(self) -> None:
        """Delete what the manifests name, files of unfinished units included, then the manifests and `run.json`."""
        manifests = Manifests(self.root)
        manifests.refresh()
        for line in list(manifests):
            for key in FILE_KEYS:
                if line.get(key):
                    (self.root / line[key]).unlink(missing_ok=True)
        for claim in self.state.glob("*.claim"):  # units in work when their process died: files without a line
            self._delete_stem(claim.name.removesuffix(".claim"))
            claim.unlink()
        for path in self.root.glob("manifest-*.jsonl"):
            path.unlink()
        self.info_path.unlink()

    def _delete_units(self, units: Iterable[Unit]) -> None:
        for unit in units:
            self._delete_stem(unit.stem)

    def _delete_stem(self, stem: str) -> None:
        for folder in SUFFIXES:
            self.file(folder, stem).unlink(missing_ok=True)

    def _sweep_partials(self, shard: Shard, units: Iterable[Unit]) -> None:
        """Remove temporary files of this shard's units (`.<name>.<pid>.part`) that a killed process left.

        Units that another shard claims are left alone: it may be writing them now.
        """
        claimed = {stem for tag, stem in units_in_work(self.state).items() if tag != shard.tag}
        stems = {unit.stem for unit in units} - claimed
        for folder, suffix in SUFFIXES.items():
            for path in (self.root / folder).glob(f".*{suffix}.*{PARTIAL_SUFFIX}"):
                if path.name[1:].rpartition(suffix + ".")[0] in stems:
                    path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Free space of the disk that holds (or will hold) the directory."""
        existing = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free


def _comparable(info: dict[str, Any]) -> dict[str, Any]:
    """The parts of `run.json` that the digest covers, flat, with the words of the message."""
    return {
        "the checkpoint": (info.get("checkpoint") or {}).get("digest", "")[:16],
        "the dataset": info.get("dataset"),
        **info["settings"],
        **{f"the version of {name}": version for name, version in (info.get("versions") or {}).items()},
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)
