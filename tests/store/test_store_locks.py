"""A lock belongs to one process, says whose it is, and dies with its holder."""

import os
import time
from pathlib import Path

import pytest
from children import start_child

from ptq.errors import PtqError
from ptq.store.locks import describe_holder, exclusive, read_small_json


def hold(path: Path, ready: Path) -> None:
    with exclusive(path, "the thing"):
        ready.touch()
        time.sleep(60)


def test_a_held_lock_is_refused_by_name_and_a_killed_holder_frees_it(tmp_path: Path):
    path, ready = tmp_path / ".out.lock", tmp_path / "ready"
    child = start_child(hold, path, ready)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(PtqError, match=rf"the thing is in use by process {child.pid} on"), exclusive(path, "the thing"):
        raise AssertionError("two holders")
    child.kill()
    child.join()
    assert path.exists()  # nobody could remove it
    with exclusive(path, "the thing"):
        assert path.exists()
    assert not path.exists()


def test_a_lock_is_free_again_after_an_error(tmp_path: Path):
    path = tmp_path / "new" / "folder" / ".lock"
    with pytest.raises(RuntimeError), exclusive(path, "it"):
        raise RuntimeError
    with exclusive(path, "it"), pytest.raises(PtqError, match=f"process {os.getpid()}"), exclusive(path, "it"):
        raise AssertionError("two holders")
    assert not path.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[1]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"pid": ' + b"9" * 50 + b"}",
        b'{"pid": 1, "x": "' + b"x" * (1 << 17) + b'"}',
    ],
)
def test_a_damaged_lock_names_nobody(tmp_path: Path, data: bytes):
    """It belongs to whoever holds it, whatever is written in it: also to nobody."""
    path = tmp_path / ".lock"
    path.write_bytes(data)
    assert read_small_json(path) == {} and describe_holder(path) == "another process"
    with exclusive(path, "it"):
        pass


def test_a_pipe_is_no_lock(tmp_path: Path):
    """Opened as a file it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe")
    assert read_small_json(tmp_path / "pipe") == {}
