"""What a VBench installation has: its place and version, and the weights each dimension needs. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptq.errors import UsageError
from ptq.evaluation.suites import get_suite
from ptq.store.ending import run_child
from ptq.store.files import read_json, scratch_directory
from ptq.store.schema import Schema, parse

DRIVER = Path(__file__).with_name("driver.py")


@dataclass(frozen=True)
class Installation:
    """A probed VBench: its package folder, cache folder, version (None in a checkout) and Python version."""

    package: Path
    cache: Path
    version: str | None
    python: str

    def describe(self) -> dict[str, Any]:
        """JSON-like form, without the cache folder (it does not decide results)."""
        return {"package": str(self.package), "version": self.version, "python": self.python}


class _Probed(Schema):
    """What the driver writes."""

    package: str
    cache: str
    version: str | None
    python: str


@dataclass(frozen=True)
class Weight:
    """A file that a dimension loads: where it belongs, where it comes from, whether it is there."""

    dimension: str
    path: Path
    source: str
    present: bool


@dataclass(frozen=True)
class Inventory:
    """What dimensions need: files of the `cache` folder, and dimension -> what else it fetches (cannot be checked here)."""

    cache: Path
    weights: list[Weight]
    elsewhere: dict[str, str]


def foreign_environment() -> dict[str, str]:
    """Our environment without what would leak this interpreter's packages into VBench's."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def probe(python: Path, root: Path | None) -> Installation:
    """Ask an interpreter where its VBench is.

    Raises:
        UsageError: no such interpreter, or it has no VBench.
    """
    executable = shutil.which(str(python))
    if executable is None:
        raise UsageError(f"{python} is not a program. Give --vbench-python the interpreter of VBench's environment.")
    with scratch_directory("ptq-vbench") as folder:
        out = folder / "probe.json"
        command = [executable, str(DRIVER), "probe", str(out), *([str(root.resolve())] if root else [])]
        log = folder / "log.txt"
        with open(log, "wb") as stream:
            code = run_child(command, stdout=stream, stderr=stream, env=foreign_environment())
        if code != 0 or not out.is_file():
            said = log.read_text(encoding="utf-8", errors="replace").strip()[-500:] or "nothing"
            raise UsageError(
                f"{python} has no usable VBench (exit code {code}; it said: {said}). Install vbench into that environment, or name a checkout with --vbench-root."
            )
        found = parse(_Probed, read_json(out), out, "Is it the interpreter of VBench's environment?")
    return Installation(Path(found.package), Path(found.cache), found.version, found.python)


def take_inventory(
    suite: str, dimensions: Sequence[str] | None = None, python: Path | None = None, root: Path | None = None
) -> Inventory:
    """The weights of a suite (of VBench's own where that suite has none), or of these dimensions only.

    Args:
        python, root: the VBench to ask for its cache folder, as `probe`; without an interpreter the default folder.

    Raises:
        UsageError: no such suite, or see `probe`.
    """
    chosen = get_suite(suite)
    names = dimensions or (chosen if chosen.is_vbench else get_suite("vbench")).scored
    default = Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")
    cache = probe(python, root).cache if python else default
    elsewhere = _table()["hub"]
    return Inventory(
        cache, required_weights(names, cache), {name: elsewhere[name] for name in names if name in elsewhere}
    )


def required_weights(dimensions: Iterable[str], cache: Path) -> list[Weight]:
    """Every file the dimensions load from VBench's cache folder, present or not."""
    table = _table()
    return [
        Weight(name, cache / table["files"][key][0], table["files"][key][1], (cache / table["files"][key][0]).is_file())
        for name in dimensions
        for key in table["dimensions"].get(name, ())
    ]


def missing_weights(dimensions: Iterable[str], cache: Path) -> list[Weight]:
    """The absent ones, each file once."""
    return list({weight.path: weight for weight in required_weights(dimensions, cache) if not weight.present}.values())


def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("weights.yaml").read_text(encoding="utf-8"))
    return table
