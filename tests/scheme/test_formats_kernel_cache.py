"""numba is imported late, and its cache on disk may be missing, full, shared by processes that start together.

One format and one dtype: where compiled files are kept does not depend on what was compiled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ptq
from ptq import formats

PACKAGE = Path(ptq.__file__).parent
CONVERT = """
import json, sys, torch
from ptq.formats import get
assert "numba" not in sys.modules
x = torch.randn(100, 128, generator=torch.Generator().manual_seed(0))
packed, scale = get("mxfp4").quantize_and_pack(x)
values = get("mxfp4").fake_quantize(x)
sums = [packed.long().sum().item(), scale.long().sum().item(), values.double().sum().item()]
from ptq.scheme import native_mxfp4 as module
kernels = [module.codes, module.values]
misses = sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels)
print(json.dumps({"sums": sums, "misses": misses, "cache": str(module.codes.stats.cache_path), "file": module.__file__}))
"""


def start(root: Path, code: str = CONVERT, **variables: str) -> subprocess.Popen[str]:
    environment = (
        {k: v for k, v in os.environ.items() if not k.startswith("NUMBA")} | variables | {"OMP_NUM_THREADS": "1"}
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """The package where no compiled file can be kept beside it: a file stands where the folder would be."""
    root = tmp_path / "site"
    (root / "ptq").mkdir(parents=True)
    (root / "ptq" / "__init__.py").touch()
    for name in ("errors.py", "formats.py", "known.py"):
        shutil.copy(PACKAGE / name, root / "ptq" / name)
    shutil.copytree(PACKAGE / "scheme", root / "ptq" / "scheme", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "ptq" / "scheme" / "__pycache__").touch()
    return root


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """What `CONVERT` prints as sums, from this process and the package's own cache."""
    x, mxfp4 = torch.randn(100, 128, generator=torch.Generator().manual_seed(0)), formats.get("mxfp4")
    packed, scale = mxfp4.quantize_and_pack(x)
    return [packed.long().sum().item(), scale.long().sum().item(), mxfp4.fake_quantize(x).double().sum().item()]


def test_the_users_cache_stands_in_for_the_packages(unwritable: Path, tmp_path: Path, expected: list[float]) -> None:
    found = finish(start(unwritable, XDG_CACHE_HOME=str(tmp_path / "cache")))
    assert found["sums"] == expected and found["misses"] == 2
    assert found["file"].startswith(str(unwritable)) and found["cache"].startswith(str(tmp_path / "cache"))
    again = finish(start(unwritable, XDG_CACHE_HOME=str(tmp_path / "cache")))
    assert again["sums"] == expected and again["misses"] == 0


def test_without_any_cache_it_runs(unwritable: Path, expected: list[float]) -> None:
    found = finish(start(unwritable, XDG_CACHE_HOME="/dev/null/none", HOME="/dev/null/none"))
    assert found["sums"] == expected and found["cache"] == "None"


def test_a_full_disk_is_no_error(unwritable: Path, tmp_path: Path, expected: list[float]) -> None:
    full = """
import numba.core.caching as caching
def save(self, *_):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = save
"""
    code = full + CONVERT.replace('assert "numba" not in sys.modules', "")
    assert finish(start(unwritable, code, XDG_CACHE_HOME=str(tmp_path)))["sums"] == expected


@pytest.mark.slow
def test_processes_that_start_together_compile_each_kernel_once(tmp_path: Path, expected: list[float]) -> None:
    together = [start(PACKAGE.parent, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(3)]
    found = [finish(process) for process in together]
    assert all(one["sums"] == expected for one in found)
    assert sum(one["misses"] for one in found) == 2
