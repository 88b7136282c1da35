"""Temporary folders go with their process, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ptq.store.temporary import temporary_folder


@pytest.fixture(autouse=True)
def own_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, ValueError])
def test_the_folder_goes_on_any_exit(own_temp: Path, ending: type[BaseException]) -> None:
    with pytest.raises(ending), temporary_folder("ptq-verify-") as folder:
        (folder / "file").write_text("x")
        assert folder.name.startswith(f"ptq-verify-{os.getpid()}-")
        raise ending
    assert list(own_temp.iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_nothing_else(own_temp: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = own_temp / f"ptq-verify-{dead.pid}-abc"
    left.mkdir()
    (left / "weights").write_text("x")
    kept = [
        own_temp / f"ptq-verify-{os.getpid()}-abc",
        own_temp / "ptq-verify-mine",
        own_temp / f"other-{dead.pid}-abc",
    ]
    for folder in kept:
        folder.mkdir()
    link = own_temp / f"ptq-verify-{dead.pid}-link"
    link.symlink_to(kept[1])
    with temporary_folder("ptq-verify-"):
        assert not left.exists() and all(folder.exists() for folder in kept) and link.is_symlink()
